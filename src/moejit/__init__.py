"""moejit: JIT-generated NVFP4 fused mixture-of-experts kernels.

One call goes through eight steps, each in a module of its own:

1. call            `runtime.api`         tensors -> checked arguments
2. problem         `codegen.problem`     shapes, dtypes, arch -> `MoeProblem`
3. plan            `codegen.select`      `MoeProblem` -> `MoePlan`, a variant per kernel
4. render          `codegen.render`      problem, plan -> `LayerSource`
5. compile         `runtime.compiler`    `LayerSource`, arch -> files in a staging folder
6. cache           `cache.store`         asked before 5, published after
7. load            `runtime.loader`      `Entry` -> callable layer
8. launch          `runtime.launcher`    layer, tensors, stream -> output

`import moejit` imports neither torch nor cutlass.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
