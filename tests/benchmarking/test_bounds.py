"""The least that a step has to do, against what the optimizers keep and multiply."""

import math
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarking import bounds, peers
from benchmarking.bounds import WORK, Machine, Product, Work
from benchmarking.optimizers import Runner
from optimizers.base import MatrixOptimizer

M, N, R = 32, 48, 4
EVERYBODY = {c.name: c for group in peers.all_groups().values() for c in group}
OURS = [name for name, c in EVERYBODY.items() if c.config]
READ_ONLY = {"U", "U_L", "U_R"}  # between refreshes


def test_every_contestant_has_a_bound():
    assert {c.method for c in EVERYBODY.values()} | {peers.adamw().method} <= WORK.keys()


@pytest.mark.parametrize("name", OURS)
def test_what_is_moved_is_weights_gradient_and_states(name):
    """Once each; twice what is written as well."""
    p = torch.nn.Parameter(torch.zeros(M, N, dtype=torch.bfloat16))
    optimizer = EVERYBODY[name].make([("w", p)], R)
    if not isinstance(optimizer, MatrixOptimizer):
        assert WORK[EVERYBODY[name].method](M, N, R).numbers == 7 * M * N  # torch's AdamW
        return
    state = optimizer.new_state(p, optimizer.param_groups[0])
    moved = {torch.bfloat16: 3 * M * N, torch.float32: 0}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            small = value.dtype == torch.bfloat16 and key == "phi"  # a number that is always counted as float32
            moved[torch.float32 if small else value.dtype] += value.numel() * (1 if key in READ_ONLY else 2)
    work = WORK[EVERYBODY[name].method](M, N, R)
    assert work.numbers == moved[torch.bfloat16]
    assert work.float32 == moved[torch.float32]


def product(_, A, B, *args, **kwargs):
    return 2 * math.prod(A) * B[-1]


# torch counts these, but not where they write into their first argument
IN_PLACE = {getattr(torch.ops.aten, name): product for name in ("addmm_", "baddbmm_")}


def operations(one):
    """Of the matrix products of an ordinary step."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        _, refreshed = one.step()
    assert not refreshed
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in EVERYBODY if "compiled" not in name])  # counted in eager mode
def test_nobody_multiplies_less_than_the_bound(name):
    """Products that torch counts in an ordinary step. A symmetric result may cost half."""
    contestant = EVERYBODY[name]
    if not contestant.installed or contestant.package == "heavyball":
        pytest.skip("not installed, or compiled")
    generator = torch.Generator().manual_seed(1)
    weights, gradients = {"w": torch.zeros(N, M)}, [torch.randn(N, M, generator=generator)]
    one = Runner(contestant, weights, gradients, R)
    one.warm_up()
    work = WORK[contestant.method](M, N, R)
    # products with a vector are counted as products by some and as sums by others
    assert operations(one) >= sum(p.operations for p in work.products if min(p.rows, p.inner, p.columns) > 1)


def test_torchs_muon_makes_just_the_products_of_the_bound():
    contestant = EVERYBODY["torch Muon"]
    one = Runner(contestant, {"w": torch.zeros(N, M)}, [torch.randn(N, M, generator=torch.Generator())], R)
    one.warm_up()
    gram, square, apply = WORK["muon"](M, N, R).products
    assert operations(one) == 2 * gram.operations + 2 * square.operations + apply.operations


@pytest.fixture
def machine(monkeypatch):
    """1 MB/s for a copy, 2 MB/s in place; 1 s for 1000 multiplications in float32, half of it in bfloat16."""
    times = iter([2.0, 1.0])
    monkeypatch.setattr(bounds, "fastest", lambda work, device: next(times))

    def make(dtype):
        made = Machine([torch.zeros(10**6 // dtype.itemsize, 1, dtype=dtype)])
        made.seconds = lambda rows, inner, columns, dtype, batch: rows * inner * columns * dtype.itemsize / 4000
        return made

    return make


def test_the_bound_is_the_larger_of_two_times(machine, monkeypatch):
    one = machine(torch.float32)
    assert (one.copy_bandwidth, one.bandwidth) == (1e6, 2e6)
    works = {
        "memory": Work(10**6, 10**6, (Product(1, 10, 10, 0.5),)),
        "products": Work(1, 0, (Product(10, 10, 10, 3),)),
    }
    for name, work in works.items():
        monkeypatch.setitem(WORK, name, lambda m, n, r, work=work: work)
    found = one.bound("memory", Counter({(2, 3): 1, (3, 2): 1}), R)
    assert found["bytes"] == 16e6 and found["bytes_ms"] == found["bound_ms"] == 8000
    assert found["product_ms"] == pytest.approx(2 * 0.5 * 100) and found["operations"] == 200
    found = one.bound("products", Counter({(2, 3): 2}), R)
    assert found["product_ms"] == found["bound_ms"] == pytest.approx(6000) and found["operations"] == 12000


def test_bfloat16_halves_both(machine, monkeypatch):
    one = machine(torch.bfloat16)
    monkeypatch.setitem(
        WORK, "some", lambda m, n, r: Work(10**6, 10, (Product(10, 10, 10), Product(1, 1, 1000, 1, True)))
    )
    found = one.bound("some", Counter({(2, 3): 1}), R)
    assert found["bytes"] == 2e6 + 40 and found["product_ms"] == pytest.approx(1000)
    wide = machine
    monkeypatch.setattr(bounds, "fastest", lambda work, device: 1.0)
    found = wide(torch.float32).bound("some", Counter({(2, 3): 1}), R)
    assert found["bytes"] == 4e6 + 40 and found["product_ms"] == pytest.approx(1000 + 500)


def test_a_machine_is_measured():
    one = Machine([torch.randn(64, 32), torch.randn(32, 32)])
    assert one.bandwidth >= one.copy_bandwidth > 0
    found = one.bound("galore", Counter({(64, 32): 1, (32, 32): 1}), R)
    assert 0 < found["bound_ms"] == max(found["bytes_ms"], found["product_ms"]) and found["product_ms"] > 0


def test_a_gpu_multiplies_as_many_matrices_at_once_as_the_model_has(monkeypatch):
    """On the meta device, since there may be no other: batched products, but for operands that would not fit."""
    sizes = []

    def note(work, device):
        sizes.append(tuple(work().shape))
        return 4.0

    monkeypatch.setattr(bounds, "fastest", note)
    one = Machine.__new__(Machine)
    one.device, one.dtype = torch.device("meta"), torch.float32
    assert one._seconds(64, 32, 16, torch.bfloat16, 8) == 0.5 and sizes == [(8, 64, 16)]
    monkeypatch.setattr(bounds, "BATCH_ENTRIES", 64 * 32 * 3)
    assert one._seconds(64, 32, 16, torch.bfloat16, 8) == 4 / 3 and sizes[1] == (3, 64, 16)
    one.device = torch.device("cpu")
    assert one._seconds(64, 32, 16, torch.bfloat16, 8) == 4 and sizes[2] == (64, 16)
