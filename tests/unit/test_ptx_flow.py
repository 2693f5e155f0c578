"""Control flow of PTX: blocks, reconvergence points, loops, against graphs drawn by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moejit.emulator.ptx import ControlFlow, control_flow, parse


def flow(body: str) -> ControlFlow:
    """Of a body with three predicates and a register; `x;` is any instruction."""
    body = body.replace("x;", "mov.b32 %r, 1;")
    text = f".version 8.8 .target sm_90a .entry k() {{ .reg .pred %p<3>; .reg .b32 %r; {body} }}"
    return control_flow(parse(text).kernel("k"))


def test_straight_line_is_one_block() -> None:
    graph = flow("x; bar.sync 0; x; ret;")
    (block,) = graph.blocks
    assert (block.start, block.stop, block.successors, block.exits) == (0, 4, (), True)
    assert graph.reconvergence == (None,) and graph.dominators == (None,)
    assert graph.loops == () and graph.irreducible == ()


def test_empty_body() -> None:
    graph = flow("")
    assert graph.blocks == () and graph.reconvergence == () and graph.loops == ()
    assert graph.dominators == () and graph.irreducible == ()


def test_if_then_else_meets_after_both() -> None:
    graph = flow("@%p0 bra B; x; bra C; B: x; C: x; ret;")
    assert [block.successors for block in graph.blocks] == [(2, 1), (3,), (3,), ()]
    assert [block.predecessors for block in graph.blocks] == [(), (0,), (0,), (1, 2)]
    assert graph.reconvergence == (3, 3, 3, None)
    assert graph.dominators == (None, 0, 0, 0)
    assert graph.block_of == (0, 1, 1, 2, 3, 3)


def test_nested_ifs() -> None:
    graph = flow("@%p0 bra E; @%p1 bra D; x; D: x; E: ret;")
    #  0 -> 4(E), 1;  1 -> 3(D), 2;  2 -> 3;  3 -> 4
    assert [block.successors for block in graph.blocks] == [(4, 1), (3, 2), (3,), (4,), ()]
    assert graph.reconvergence == (4, 3, 3, 4, None)


def test_loop_with_an_exit_in_the_middle() -> None:
    graph = flow("L: x; @%p0 bra OUT; x; bra L; OUT: ret;")
    (loop,) = graph.loops
    assert (loop.header, loop.blocks, loop.latches, loop.parent) == (
        0,
        frozenset({0, 1}),
        (1,),
        None,
    )
    assert graph.reconvergence == (2, 0, None)


def test_nested_loops_and_one_of_a_single_block() -> None:
    graph = flow("x; L1: x; L2: @%p0 bra L2; @%p1 bra L1; x; L3: @%p2 bra L3; ret;")
    outer, inner, last = graph.loops
    assert (outer.header, outer.blocks, outer.parent) == (1, frozenset({1, 2, 3}), None)
    assert (inner.header, inner.blocks, inner.parent) == (2, frozenset({2}), 0)
    assert (last.header, last.blocks, last.parent) == (5, frozenset({5}), None)


def test_loop_with_two_ways_back() -> None:
    graph = flow("L: @%p0 bra L; @%p1 bra L; ret;")
    (loop,) = graph.loops
    assert loop.latches == (0, 1) and loop.blocks == {0, 1}


def test_early_return_meets_nowhere() -> None:
    graph = flow("@%p0 bra B; ret; B: x; ret;")
    assert graph.reconvergence == (None, None, None)


def test_guarded_exit_goes_on() -> None:
    graph = flow("@%p0 exit; x;")
    assert [block.successors for block in graph.blocks] == [(1,), ()]
    assert [block.exits for block in graph.blocks] == [True, True]
    assert graph.reconvergence == (None, None)


def test_trap_ends() -> None:
    graph = flow("@%p0 bra OK; trap; OK: ret;")
    assert [block.successors for block in graph.blocks] == [(2, 1), (), ()]


def test_code_after_a_branch_is_dead() -> None:
    graph = flow("bra B; x; B: ret;")
    assert graph.dominators == (None, None, 0)
    assert not graph.dominates(0, 1) and graph.dominates(0, 2) and graph.dominates(0, 0)
    assert graph.reconvergence == (2, 2, None)


def test_endless_loop_has_no_reconvergence() -> None:
    graph = flow("@%p0 bra B; L: bra L; B: ret;")
    assert graph.reconvergence == (2, None, None)
    assert [loop.header for loop in graph.loops] == [1]


def test_indirect_branch_goes_to_its_table() -> None:
    graph = flow("T: .branchtargets A, B, A; brx.idx %r, T; A: x; B: ret;")
    assert [block.successors for block in graph.blocks] == [(1, 2), (2,), ()]


def test_label_at_the_end_is_the_exit() -> None:
    graph = flow("@%p0 bra END; x; END:")
    assert [(block.successors, block.exits) for block in graph.blocks] == [((1,), True), ((), True)]


def test_labels_of_scopes() -> None:
    wait = "{ L: x; @%p0 bra D; bra L; D: }"
    graph = flow(wait + wait + "ret;")
    assert [block.successors for block in graph.blocks] == [(2, 1), (0,), (4, 3), (2,), ()]
    assert [loop.header for loop in graph.loops] == [0, 2]


def test_jump_into_a_loop_is_irreducible() -> None:
    graph = flow("@%p0 bra B; A: x; B: @%p1 bra A; ret;")
    assert graph.loops == ()
    assert len(graph.irreducible) == 1
    assert flow("L: @%p0 bra L; ret;").irreducible == ()


# ---- against definitions -------------------------------------------------------------------------

MAX_BLOCKS = 8


@st.composite
def graphs(draw: st.DrawFn) -> str:
    """A body of blocks that end in a guarded branch, a branch, a return or nothing."""
    count = draw(st.integers(1, MAX_BLOCKS))
    parts = []
    for n in range(count):
        target = draw(st.integers(0, count - 1))
        end = draw(
            st.sampled_from([f"@%p0 bra L{target};", f"bra L{target};", "ret;", "@%p1 exit;", ""])
        )
        parts.append(f"L{n}: x; {end}")
    return " ".join(parts)


def reachable(graph: ControlFlow, start: int, without: int | None) -> tuple[set[int], bool]:
    """Blocks on paths from `start` that avoid one block, and whether such a path leaves."""
    seen: set[int] = set()
    waiting = [] if start == without else [start]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [s for s in graph.blocks[node].successors if s != without]
    return seen, any(graph.blocks[node].exits for node in seen)


@given(graphs())
def test_dominators_are_what_no_path_avoids(body: str) -> None:
    graph = flow(body)
    everywhere = range(len(graph.blocks))
    alive, _ = reachable(graph, 0, None)
    for node in everywhere:
        strict = {d for d in alive - {node} if node not in reachable(graph, 0, d)[0]}
        if node == 0 or node not in alive:
            assert graph.dominators[node] is None
            continue
        nearest = graph.dominators[node]
        assert nearest in strict
        # the immediate one is dominated by all the others
        assert all(d == nearest or nearest not in reachable(graph, 0, d)[0] for d in strict)


@given(graphs())
def test_reconvergence_is_the_first_block_that_no_way_out_avoids(body: str) -> None:
    graph = flow(body)
    for node in range(len(graph.blocks)):
        found = graph.reconvergence[node]
        _, ends = reachable(graph, node, None)
        strict = {d for d in range(len(graph.blocks)) if not reachable(graph, node, d)[1]} - {node}
        if not ends:
            assert found is None
        elif found is None:
            assert not strict
        else:
            assert found in strict
            # every other one comes after it
            assert all(d == found or not reachable(graph, found, d)[1] for d in strict)


@given(graphs())
def test_blocks_cover_every_instruction_once(body: str) -> None:
    graph = flow(body)
    covered = [i for block in graph.blocks for i in range(block.start, block.stop)]
    assert covered == list(range(len(graph.block_of)))
    assert all(graph.block_of[i] == b.index for b in graph.blocks for i in range(b.start, b.stop))
    for block in graph.blocks:
        assert all(block.index in graph.blocks[s].predecessors for s in block.successors)


@given(graphs())
def test_loops_or_irreducible_edges_explain_every_cycle(body: str) -> None:
    graph = flow(body)
    alive, _ = reachable(graph, 0, None)
    back = {(latch, loop.header) for loop in graph.loops for latch in loop.latches}
    back |= set(graph.irreducible)
    left = {n: [s for s in graph.blocks[n].successors if (n, s) not in back] for n in alive}
    while sinks := [n for n, following in left.items() if not set(following) & set(left)]:
        for n in sinks:
            del left[n]
    assert left == {}
    for loop in graph.loops:
        assert loop.header in loop.blocks and set(loop.latches) <= loop.blocks
        assert all(graph.dominates(loop.header, n) for n in loop.blocks)
        assert loop.parent is None or loop.blocks <= graph.loops[loop.parent].blocks
