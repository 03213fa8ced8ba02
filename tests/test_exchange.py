"""Layouts, owners and turns on paper, and the exchange itself on ranks that are threads: equality, not closeness."""

import itertools
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_muon.exchange import collectives
from hf_muon.exchange.exchange import Exchange, Slice, _runs
from hf_muon.exchange.layout import REPLICATED, Span, cut, even_placement, flat_placements, span_on
from hf_muon.exchange.ownership import elements, plan_jobs, plan_turns, step_flops, traffic, work
from hf_muon.matrices import MatrixLayout
from tests.test_matrices import LAYOUTS


def numel(layout):
    return elements([layout])


def flat(layouts, ranks, gaps=None, padding=0):
    """ZeRO-1 and -2: one buffer, with gaps before parameters and padding at its end."""
    offsets, at = [], 0
    for layout, gap in zip(layouts, gaps or [0] * len(layouts), strict=True):
        offsets.append(at + gap)
        at += gap + numel(layout)
    partition = -(-(at + padding) // (2 * ranks)) * 2
    return flat_placements(offsets, [numel(x) for x in layouts], partition, ranks)


def place(layouts, ranks, engine):
    """Where an engine would put these parameters."""
    if engine == "zero1":
        return flat(layouts, ranks)
    if engine == "gaps":
        return flat(layouts, ranks, [i % 5 for i in range(len(layouts))], padding=7)
    if engine == "zero3":
        return [even_placement(numel(x), ranks) for x in layouts]
    if engine == "fsdp2":
        return [even_placement(numel(x), ranks, numel(x) // x.shape[0]) for x in layouts]
    return [REPLICATED] * len(layouts)


ENGINES = ("zero1", "gaps", "zero3", "fsdp2", "ddp")


# ---- slabs and placements


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_slabs_hold_every_element_once_and_the_parameters_own_matrices(layout):
    whole = torch.arange(numel(layout)).reshape(layout.shape)
    expected = [m for i, p in enumerate(layout.pieces(whole)) for m in layout.to_matrices(p, i).unbind()]
    found, end = [], 0
    for slab in layout.slabs():
        assert slab.start == end, "consecutive"
        end = slab.stop
        part = whole.flatten()[slab.start : slab.stop].view(slab.layout.shape)
        assert slab.layout.transposed == layout.transposed
        for i, piece in enumerate(slab.layout.pieces(part)):
            found += slab.layout.to_matrices(piece, i).unbind()
    assert end == whole.numel()
    assert sorted(m.tolist() for m in found) == sorted(m.tolist() for m in expected)


def test_slabs_are_as_small_as_whole_matrices_allow():
    sizes = {name: len(layout.slabs()) for name, layout in LAYOUTS.items()}
    assert sizes["linear"] == sizes["interleaved by head"] == sizes["output projection per head"] == 1
    assert sizes["q, k, v"] == sizes["experts"] == sizes["grouped convolution"] == 3
    assert sizes["q, k, v per head"] == 4 and sizes["experts, gate then up"] == 6 and sizes["grouped, cut"] == 6


def check_placement(placement, size, ranks):
    assert placement, "only replicas are empty"
    assert placement[0].start == 0 and placement[-1].stop == size
    assert all(a.stop == b.start and a.rank < b.rank for a, b in itertools.pairwise(placement))
    assert all(s.start < s.stop and 0 <= s.rank < ranks for s in placement), "no empty span"
    held = [span_on(placement, r, size) for r in range(ranks)]
    assert sum(b - a for a, b in held) == size
    assert {(r, *h) for r, h in enumerate(held) if h != (0, 0)} == set(placement)


def test_flat_placements_cover_each_parameter_once_over_any_number_of_ranks():
    rng = random.Random(0)
    spread = Counter()
    for _ in range(500):
        ranks, sizes = rng.randint(1, 7), [rng.randint(1, 40) for _ in range(rng.randint(1, 9))]
        layouts = [MatrixLayout((1, n)) for n in sizes]
        gaps = [rng.choice((0, 0, 3)) for _ in sizes]
        placements = flat(layouts, ranks, gaps, padding=rng.randint(0, 30))
        for placement, size in zip(placements, sizes, strict=True):
            check_placement(placement, size, ranks)
            spread[len(placement)] += 1
    assert all(spread[n] for n in (1, 2, 3, 4)), spread


def test_flat_placement_by_hand():
    # partitions of 10: 0-9, 10-19, 20-29, 30-39
    assert flat_placements([0, 8, 12], [8, 4, 25], 10, 4) == [
        (Span(0, 0, 8),),
        (Span(0, 0, 2), Span(1, 2, 4)),
        (Span(1, 0, 8), Span(2, 8, 18), Span(3, 18, 25)),
    ]
    with pytest.raises(ValueError, match="outside of 4 partitions of 10"):
        flat_placements([38], [4], 10, 4)


@pytest.mark.parametrize("unit", [1, 3, 8])
def test_even_placements_cover_each_parameter_once_with_empty_shards(unit):
    empty = 0
    for ranks in range(1, 9):
        for rows in range(1, 20):
            placement = even_placement(rows * unit, ranks, unit)
            check_placement(placement, rows * unit, ranks)
            assert all(s.start % unit == 0 and s.stop % unit == 0 for s in placement), "rows stay whole"
            assert all(s.stop - s.start == placement[0].stop for s in placement[:-1]), "equal chunks but for the last"
            assert placement[0].stop == -(-rows // ranks) * unit
            empty += ranks - len(placement)
    assert empty


def test_cut_keeps_what_lies_inside():
    placement = even_placement(30, 3)
    assert cut(placement, 5, 15) == (Span(0, 5, 10), Span(1, 10, 15))
    assert cut(placement, 20, 30) == (Span(2, 20, 30),)
    assert span_on(REPLICATED, 3, 30) == (0, 30)
    assert cut(REPLICATED, 5, 15) == REPLICATED


# ---- owners


def decoder(layers, hidden, inner, kv):
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return [MatrixLayout(shape) for shape in shapes] * layers


def experts(layers, hidden, inner, count):
    one = [MatrixLayout((hidden, hidden)), MatrixLayout((576, hidden)), MatrixLayout((count, hidden))]
    one += [MatrixLayout((count, 2 * inner, hidden), batch=1, sizes=(inner, inner))]
    one += [MatrixLayout((count, hidden, inner), batch=1)]
    return [MatrixLayout((11264, hidden)), MatrixLayout((hidden, 11264))] + one * layers


def gpt2(layers, hidden):
    one = [MatrixLayout((hidden, 3 * hidden), dim=1, sizes=(hidden,) * 3, transposed=True)]
    one += [MatrixLayout((hidden, n * hidden), transposed=True) for n in (1, 4)]
    return (one + [MatrixLayout((4 * hidden, hidden), transposed=True)]) * layers


MODELS = {
    "Qwen2.5-0.5B": decoder(24, 896, 4864, 128),
    "Qwen2.5-7B": decoder(28, 3584, 18944, 512),
    "Llama-3-70B": decoder(80, 8192, 28672, 1024),
    "Moonlight": experts(26, 2048, 1408, 64),
    "GPT-2": gpt2(12, 768),
    "GPT-2 XL": gpt2(48, 1600),
}


def matrices(jobs):
    return sum(job.layout.total() for job in jobs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_work_is_balanced_wherever_there_are_eight_matrices_a_rank(name, engine):
    checked = 0
    for ranks in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256):
        if sum(x.total() for x in MODELS[name]) < 8 * ranks:
            continue
        jobs = plan_jobs(MODELS[name], place(MODELS[name], ranks, engine), ranks)
        loads = work(jobs, ranks)
        assert sum(loads) == sum(n * step_flops(a, b) for x in MODELS[name] for n, a, b in x.matrices())
        assert max(loads) * ranks <= 1.10 * sum(loads), f"{ranks} ranks: {max(loads) * ranks / sum(loads):.3f}"
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("engine", ENGINES)
def test_every_matrix_has_one_owner_and_plans_are_reproducible(engine):
    layouts = [*LAYOUTS.values()] * 2
    for ranks in (1, 2, 3, 5, 40):
        jobs = plan_jobs(layouts, place(layouts, ranks, engine), ranks)
        assert all(0 <= job.owner < ranks for job in jobs)
        assert matrices(jobs) == sum(layout.total() for layout in layouts)
        slabs = [(i, s.start, s.stop) for i, layout in enumerate(layouts) for s in layout.slabs()]
        assert [(j.param, j.start, j.stop) for j in jobs] == slabs
        again = plan_jobs(list(layouts), place(layouts, ranks, engine), ranks)
        assert [j.owner for j in again] == [j.owner for j in jobs]


def test_a_matrix_that_is_whole_somewhere_stays_there():
    layouts = [MatrixLayout((8, 8))] * 16
    for ranks in (2, 4, 8):
        jobs = plan_jobs(layouts, flat(layouts, ranks), ranks)
        assert not any(job.straddles for job in jobs)
        assert traffic(jobs, ranks) == [0] * ranks


@pytest.mark.parametrize(("first", "owner"), [(30, 1), (70, 0)])
def test_a_straddling_matrix_goes_to_the_holder_of_most_of_it(first, owner):
    # one whole matrix on each of two ranks, and one of 100 elements across them, of which the first rank has some
    placements = flat_placements([0, 200 - first, 300 - first], [100] * 3, 200, 2)
    jobs = plan_jobs([MatrixLayout((10, 10))] * 3, placements, 2)
    assert [job.owner for job in jobs] == [0, owner, 1]
    assert traffic(jobs, 2) == [30, 30]


def test_unless_that_rank_has_its_share_of_the_work_already():
    # three whole matrices on the first rank, which also has most of the fourth
    placements = flat_placements([0, 100, 200, 310], [100] * 4, 400, 2)
    placements[3] = (Span(0, 0, 90), Span(1, 90, 100))
    jobs = plan_jobs([MatrixLayout((10, 10))] * 4, placements, 2)
    assert jobs[3].owner == 1


@pytest.mark.parametrize("engine", ("zero3", "fsdp2"))
def test_even_shards_of_one_matrix_per_rank_give_each_rank_one(engine):
    layouts = [MatrixLayout((64, 64))] * 6
    jobs = plan_jobs(layouts, place(layouts, 6, engine), 6)
    assert sorted(job.owner for job in jobs) == list(range(6))


# ---- turns and traffic


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("budget", [1, 100, 10_000_000])
def test_turns_hold_every_job_once_within_the_budget_and_travellers_first(engine, budget):
    layouts = [*LAYOUTS.values()] * 3
    for ranks in (1, 2, 3, 5):
        jobs = plan_jobs(layouts, place(layouts, ranks, engine), ranks)
        turns = plan_turns(jobs, ranks, budget)
        assert sorted(id(j) for turn in turns for j in turn) == sorted(map(id, jobs))
        for rank in range(ranks):
            mine = [[j for j in turn if j.owner == rank] for turn in turns]
            assert all(len(own) == 1 or sum(j.numel for j in own) <= budget for own in mine if own)
            travelling = [j.straddles for own in mine for j in own]
            assert travelling == sorted(travelling, reverse=True), "what travels comes first"
            assert [bool(own) for own in mine] == sorted((bool(own) for own in mine), reverse=True), "no idle gaps"
        if budget > 1_000_000:
            assert len(turns) == 1


class World:
    """Ranks that are threads, and collectives that count what leaves each of them."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.board = [None] * ranks
        self.sent = [0] * ranks

    def swap(self, rank, mine):
        self.board[rank] = mine
        self.barrier.wait()
        board = list(self.board)
        self.barrier.wait()
        return board

    def run(self, work):
        def guarded(rank):
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.ranks) as pool:
            return [future.result() for future in [pool.submit(guarded, r) for r in range(self.ranks)]]


def all_to_all(outgoing, incoming, like, member):
    world, rank = member
    assert len(outgoing) == len(incoming) == world.ranks and not outgoing[rank] and not incoming[rank]
    world.sent[rank] += sum(t.numel() for parts in outgoing for t in parts)
    board = world.swap(rank, [torch.cat([like.new_empty(0), *parts]) for parts in outgoing])
    received = [theirs[rank] for theirs in board]
    assert [t.numel() for t in received] == list(incoming)
    return lambda: received


def broadcast(values, source, member):
    world, rank = member
    world.sent[rank] += 0 if rank == (source - 1) % world.ranks else values.numel()
    board = world.swap(rank, (values, source))
    assert len({(t.numel(), said) for t, said in board}) == 1
    return values.copy_(board[source][0]) if rank != source else values


def as_rows(shape, stack):
    """Matrices that can be sorted and compared: logical shape, and the elements as stored."""
    return [(shape, m.tolist()) for m in stack.unbind()]


def rehearse(monkeypatch, layouts, placements, ranks, budget, active=None):
    """One exchange on all ranks, with numbers that name each element; returns the world."""
    monkeypatch.setattr(collectives, "all_to_all", all_to_all)
    monkeypatch.setattr(collectives, "broadcast", broadcast)
    active = range(len(layouts)) if active is None else active
    world = World(ranks)
    whole, at = [], 0
    for layout in layouts:
        whole.append(torch.arange(at, at + numel(layout), dtype=torch.float64))
        at += numel(layout)

    def one_rank(rank):
        exchange = Exchange(layouts, placements, rank=rank, ranks=ranks, group=(world, rank), budget=budget)
        spans = [span_on(p, rank, numel(x)) for p, x in zip(placements, layouts, strict=True)]
        stored = [w[a:b] for w, (a, b) in zip(whole, spans, strict=True)]
        result = [torch.full_like(t, torch.nan) for t in stored]
        like, seen = torch.empty(0, dtype=torch.float64), []
        values = lambda turn: [stored[i][a:b] for i, a, b in turn.slices]  # noqa: E731
        for turn, stacks in exchange.to_matrices(active, values, like):
            seen += [row for s in stacks for row in as_rows(s.shape, s.matrices)]
            # The largest entry names the matrix: an update that came from another one would be seen.
            results = [s.matrices + s.matrices.amax(dim=(1, 2), keepdim=True) for s in stacks]
            for (i, a, b), change in turn.to_storage(results, like):
                assert result[i][a:b].isnan().all(), "written twice"
                result[i][a:b] = change
        return seen, result

    ends = world.run(one_rank)
    expected, updates = [], []
    for i, layout in enumerate(layouts):
        view = whole[i].view(layout.shape)
        update = torch.full_like(view, torch.nan)
        pieces = zip(layout.pieces(view), layout.pieces(update), layout.matrices(), strict=True)
        for k, (piece, target, (_, a, b)) in enumerate(pieces if i in active else ()):
            stack = layout.to_matrices(piece, k)
            expected += as_rows((a, b), stack)
            target.copy_(layout.from_matrices(stack + stack.amax(dim=(1, 2), keepdim=True), k, target))
        updates.append(update.flatten())
    assert sorted(row for seen, _ in ends for row in seen) == sorted(expected), "each matrix whole, on one rank"
    for rank, (_, result) in enumerate(ends):
        for i, (got, placement) in enumerate(zip(result, placements, strict=True)):
            a, b = span_on(placement, rank, numel(layouts[i]))
            assert torch.equal(got.nan_to_num(-1), updates[i][a:b].nan_to_num(-1)), f"rank {rank}, parameter {i}"
    return world


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_exchange_gives_whole_matrices_and_exact_slices(monkeypatch, engine, ranks):
    layouts = [*LAYOUTS.values(), MatrixLayout((1, 7)), MatrixLayout((2, 9)), *LAYOUTS.values()]
    placements = place(layouts, ranks, engine)
    for budget in (1, 100, 10_000_000):
        world = rehearse(monkeypatch, layouts, placements, ranks, budget)
        jobs = plan_jobs(layouts, placements, ranks)
        assert traffic(jobs, ranks) == world.sent
        assert any(world.sent)


@pytest.mark.parametrize("engine", ENGINES)
def test_exchange_of_parameters_with_gradients_only(monkeypatch, engine):
    layouts = [*LAYOUTS.values()]
    placements = place(layouts, 3, engine)
    active = frozenset(range(1, len(layouts), 3))
    rehearse(monkeypatch, layouts, placements, 3, 100, active)
    rehearse(monkeypatch, layouts, placements, 3, 100, frozenset())


@pytest.mark.parametrize("engine", ("zero1", "zero3"))
def test_exchange_of_one_matrix_over_many_ranks_and_of_ranks_that_hold_nothing(monkeypatch, engine):
    layouts = [MatrixLayout((3, 7)), MatrixLayout((2, 2))]
    placements = place(layouts, 7, engine)
    assert len(placements[0]) >= 3
    rehearse(monkeypatch, layouts, placements, 7, 10)
    alone = flat_placements([0, 40], [21, 4], 12, 7)  # ranks 2, 4, 5 and 6 hold nothing
    rehearse(monkeypatch, layouts, alone, 7, 10)


def test_random_layouts_and_cuts(monkeypatch):
    rng = random.Random(1)
    pool = [*LAYOUTS.values(), MatrixLayout((1, 5)), MatrixLayout((30, 2)), MatrixLayout((2, 30))]
    for _ in range(60):
        ranks, layouts = rng.randint(1, 6), rng.choices(pool, k=rng.randint(1, 10))
        engine = rng.choice(ENGINES if ranks > 1 else ("zero1",))
        if engine == "gaps":
            placements = flat(layouts, ranks, [rng.randint(0, 20) for _ in layouts], rng.randint(0, 60))
        else:
            placements = place(layouts, ranks, engine)
        rehearse(monkeypatch, layouts, placements, ranks, rng.choice((1, 30, 200, 10_000)))


def test_one_process_sends_nothing(monkeypatch):
    layouts = [*LAYOUTS.values()]
    world = rehearse(monkeypatch, layouts, [(Span(0, 0, numel(x)),) for x in layouts], 1, 50)
    assert world.sent == [0]


def test_the_next_slices_are_sent_before_this_turns_matrices_are_computed(monkeypatch):
    events = []

    def recorded(outgoing, incoming, like, group):
        events.append("sent")
        return lambda: events.append("received") or [like.new_empty(n) for n in incoming]

    monkeypatch.setattr(collectives, "all_to_all", recorded)
    # Three matrices, each in halves on two ranks, one in a turn; rank 0 owns at least one.
    layouts, placements = [MatrixLayout((4, 4))] * 3, [(Span(0, 0, 8), Span(1, 8, 16))] * 3
    exchange = Exchange(layouts, placements, rank=0, ranks=2, group="any", budget=16)
    like = torch.empty(0)
    for _turn, _stacks in exchange.to_matrices(
        range(3), lambda turn: [torch.ones(b - a) for _, a, b in turn.slices], like
    ):
        events.append("computed")
    turns = len(exchange.turns(range(3)))
    assert turns > 1
    assert events == ["sent", *["sent", "received", "computed"] * (turns - 1), "received", "computed"]


def test_turns_are_kept_for_the_same_gradients_and_not_for_ever():
    layouts = [MatrixLayout((4, 4))] * 3
    exchange = Exchange(layouts, [(Span(0, 0, 16),)] * 3, budget=16)
    assert exchange.turns([0, 1, 2]) is exchange.turns((2, 1, 0)) and len(exchange.turns([0, 1, 2])) == 3
    exchange.turns([0])
    assert len(exchange._turns) == 1


def test_neighbouring_slices_of_a_parameter_are_one_run():
    slices = [Slice(0, 0, 4), Slice(0, 4, 8), Slice(0, 12, 16), Slice(1, 16, 20), Slice(1, 20, 21)]
    assert _runs(slices) == [(Slice(0, 0, 8), [4, 4]), (Slice(0, 12, 16), [4]), (Slice(1, 16, 21), [4, 1])]
