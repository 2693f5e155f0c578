"""A small layer of two kernels with the host signature of a real one, for tests of the compiler."""

from __future__ import annotations

from dataclasses import replace

from moejit.codegen.render import LayerSource, SourceFile

_KERNEL = """\
import cutlass
import cutlass.cute as cute
from cutlass.cute.typing import Int32, Int64


@cute.kernel
def {name}(x: Int64, tokens: Int32):
    tid, _, _ = cute.arch.thread_idx()
    cute.arch.griddepcontrol_wait()
    gmem = cute.make_ptr(Int32, x, cute.AddressSpace.gmem, assumed_align=4)
    view = cute.make_tensor(gmem, cute.make_layout(64))
    if tid < tokens:
        view[tid] = {value}


{name}.set_name_prefix("moejit_toy_{name}", remove_cutlass_symbol=True, keep_mangled_name=False)
"""
_HOST = """\
import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass.cute.typing import Int32, Int64

from .first import first
from .second import second


@cute.jit
def moe_layer(
    out: cute.Tensor, x: Int64, x_sf: Int64, ids: Int64, scales: Int64, w1: Int64, w1_sf: Int64,
    w1_alpha: Int64, fc2_scale: Int64, w2: Int64, w2_sf: Int64, w2_alpha: Int64, workspace: Int64,
    tokens: Int32, num_local_experts: Int32, local_expert_offset: Int32, num_sms: Int32,
    stream: cuda.CUstream,
):
    first(x, tokens).launch(grid=(1, 1, 1), block=(64, 1, 1), stream=stream, use_pdl=True)
    second(x, tokens).launch(grid=(num_sms, 1, 1), block=(64, 1, 1), stream=stream, use_pdl=True)


def compile_arguments():
    out = cute.runtime.make_fake_compact_tensor(
        cutlass.BFloat16, (cute.sym_int(), 128), stride_order=(1, 0), assumed_align=16
    )
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return (out, *[Int64(0)] * 12, *[Int32(0)] * 4, stream)
"""

TEMPLATE_OFFSET = 1000  # line n of a file comes from line n + 1000 of its template


def toy_layer(arch: str = "sm_90a", **edits: tuple[str, str]) -> LayerSource:
    """The layer; ``first=(old, new)`` replaces text in first.py."""
    texts = {
        "__init__": "",
        "first": _KERNEL.format(name="first", value="tid"),
        "second": _KERNEL.format(name="second", value="view[tid] + 1"),
        "kernel": _HOST,
    }
    for name, (old, new) in edits.items():
        assert old in texts[name]
        texts[name] = texts[name].replace(old, new)
    files = []
    for name, text in texts.items():
        template = f"toy/{name}.py.j2" if text else ""
        origins = tuple((template, n + TEMPLATE_OFFSET) for n in range(1, text.count("\n") + 2))
        files.append(SourceFile(name=f"{name}.py", template=template, text=text, origins=origins))
    return LayerSource(
        name="toy", symbol_prefix="moejit_toy", arch=arch, files=tuple(files), facts={"hidden": 128}
    )


def rename(source: LayerSource, name: str) -> LayerSource:
    """The same text under another name."""
    return replace(source, name=name)
