"""Matrices divided among processes: the numbers of one process, and a part of the state.

Four processes do it all once (sharded.py), alone, in pairs and together; the tests look at what they have found.

Tolerances. With replicated weights, and with sharded ones where Adam's parameters rest, nothing is summed in another order:
bit for bit. Else gradients are: in float64, sums over 96 rows differ by some 2^-53, and a relative change of 1e-9 in every
gradient entry, made on purpose, changed losses and weights by at most 1e-8 (Sophia-H; 1e-9 for most): a factor of 10.
TOLERANCE leaves another thousand. Methods that divide a rotated gradient by its own size lift rounding in entries that are
0 by 1 / eps = 1e8, so theirs is LIFTED. A wrong formula, row or share is off by more than 1e-4.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from optimizers import METHODS, create
from optimizers.memory import llama, make, state_bytes
from optimizers.sharding import assign, cost, shard

from . import sharded

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-12
LIFTED = dict.fromkeys(("low_rank_soap", "shampoo", "soap", "soap_factored"), 1e-8)
# float32: sums over 96 rows in another order, at most 96 * 2^-24, times the factor of 10 at most, seldom so bad
SINGLE = dict.fromkeys(sharded.SINGLE, 1e-5)
SERVED = [name for name in METHODS if name not in sharded.NOT_SHARDED]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "tests.optimizers.sharded", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(sharded.RANKS)]
    return ranks


def on_ranks(found, *key):
    return [facts[key] for facts in found if key in facts]


def distance(ours, theirs):
    """The largest relative error of a loss or of a tensor of weights."""
    pairs = [(torch.tensor(x), torch.tensor(y)) for x, y in zip(ours["losses"], theirs["losses"], strict=True)]
    pairs += zip(ours["weights"], theirs["weights"], strict=True)
    return float(np.max([((x - y).norm() / y.norm().clamp_min(1e-9)).item() for x, y in pairs]))  # NaN if there is one


def same(ours, theirs):
    return ours["losses"] == theirs["losses"] and sharded.same(ours["weights"], theirs["weights"])


# Every method ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_replicated_weights_are_those_of_one_process_bit_for_bit(found, name, processes):
    (one,) = on_ranks(found, "alone", name)
    many = on_ranks(found, f"replicated {processes}", name)
    assert len(many) == processes
    assert math.isfinite(one["losses"][-1]) and len(set(one["losses"])) == sharded.STEPS
    assert all(same(facts, one) for facts in many)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", SERVED)
def test_sharded_weights_and_rows_give_what_one_process_has(found, name, processes):
    (one,) = on_ranks(found, "alone exact", name)
    many = on_ranks(found, f"sharded {processes}", name)
    assert len(many) == processes
    limit = (LIFTED | SINGLE).get(name, TOLERANCE)
    assert max(distance(facts, one) for facts in many) < limit


@pytest.mark.parametrize("name", [name for name in SERVED if name not in sharded.ELEMENTWISE])
def test_sharded_matrices_are_those_of_one_process_bit_for_bit(found, name):
    """In float32, Adam's rate being 0: Adam's kernel rounds otherwise at the end of a shard."""
    (one,) = on_ranks(found, "alone, Adam at rest", name)
    many = on_ranks(found, "sharded 2, Adam at rest", name)
    assert len(many) == 2 and all(same(facts, one) for facts in many)


@pytest.mark.parametrize("name", sharded.HYBRID)
def test_a_mesh_of_two_dimensions_copies_shards(found, name):
    (one,) = on_ranks(found, "alone exact", name)
    many = on_ranks(found, "hybrid", name)
    assert len(many) == 4 and max(distance(facts, one) for facts in many) < TOLERANCE
    assert [facts["bytes"] for facts in many[:2]] == [facts["bytes"] for facts in many[2:]]


@pytest.mark.parametrize("name", METHODS)
def test_every_state_lies_on_one_rank(found, name):
    (one,) = on_ranks(found, "alone", name)
    for processes in (2, 4):
        sizes = [facts["bytes"] for facts in on_ranks(found, f"replicated {processes}", name)]
        assert sum(sizes) == one["bytes"]


# Owners ---------------------------------------------------------------------------------------------------------------


def load(costs, owners, ranks):
    return max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks))


@pytest.mark.parametrize(("ranks", "n"), [(2, 9), (3, 7), (4, 5), (3, 2)])
def test_the_fullest_rank_has_at_most_grahams_multiple_of_the_best(ranks, n):
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        costs = (torch.rand(n, generator=g).square() * 1e6).tolist()
        best = min(load(costs, owners, ranks) for owners in itertools.product(range(ranks), repeat=n))
        assert load(costs, assign(costs, ranks), ranks) <= (4 / 3 - 1 / (3 * ranks)) * best * (1 + 1e-12)


def test_owners_follow_from_costs_alone():
    assert assign([1.0, 1.0, 1.0, 1.0], 2) == [0, 1, 0, 1]
    assert assign([1.0, 5.0, 3.0, 2.0], 2) == [0, 0, 1, 1]
    assert assign([3.0, 5.0], 4) == [1, 0]  # two ranks have none
    assert assign([], 3) == []


def test_all_ranks_find_the_same_owners(found):
    owners = [facts["teams"]["owners"] for facts in found]
    assert owners == owners[:1] * 4 and set(owners[0]) == {0, 1, 2, 3}


def bytes_by_rank(optimizer, ranks):
    """Of the states of matrices, from shapes alone."""
    groups = [group for group in optimizer.param_groups if not group.get("adam")]
    params = [list(group["params"]) for group in groups]
    matrices = [p for some in params for p in some]
    owner = dict(zip(matrices, assign([cost(p) for p in matrices], ranks), strict=True))
    sizes = []
    for rank in range(ranks):
        for group, some in zip(groups, params, strict=True):
            group["params"] = [p for p in some if owner[p] == rank]
        every = zip(optimizer.param_groups, state_bytes(optimizer), strict=True)
        sizes.append(sum(size for group, size in every if not group.get("adam")))
    return sizes


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_states_are_balanced(name, ranks):
    """To 15 % of the mean, on the shapes of llama_tiny."""
    shape = yaml.safe_load((ROOT / "configs/model/llama_tiny.yaml").read_text())
    model = llama(shape)
    if name == "any":
        optimizer = create(name, model, target="torch.optim.Muon", lr=0.1, verbose=False)
    else:
        optimizer = make(name, model, rank=64)
    sizes = bytes_by_rank(optimizer, ranks)
    mean = sum(sizes) / ranks
    assert max(abs(size - mean) for size in sizes) <= 0.15 * mean
    assert (mean == 0) == (name in ("normalization", "swan", "whitening"))  # they have no state


def test_ranks_allocate_what_their_matrices_need(found):
    optimizer = create("alice", llama(sharded.LLAMA, torch.float32), rank=8, leading=4, verbose=False)
    sizes = bytes_by_rank(optimizer, 4)
    assert [facts["bytes"][0] for facts in found] == sizes
    optimizer = create("alice", llama(sharded.LLAMA, torch.float32), rank=8, leading=4, verbose=False)
    assert [facts["bytes"][1] for facts in found] == bytes_by_rank(optimizer, 2) * 2


def test_whole_matrices_are_collected_and_delivered(found):
    """Of all dtypes, cut by rows and by columns, into parts that may be empty; at once and in many rounds."""
    assert sum(facts["teams"]["empty"] for facts in found) >= 6
    for facts in found:
        done = {key: right for key, right in facts["teams"].items() if isinstance(key, tuple)}
        assert len(done) == 12 and all(done.values())


def test_other_layouts_are_refused(found):
    for facts in found:
        assert len(facts["refused"]) == 3
        for placements, message in facts["refused"].items():
            assert message == (
                f"a matrix is laid out as ({placements[1:-1]}), but its update needs it whole: use fully_shard alone, on a "
                "mesh of one dimension or of two (HSDP), without tensor parallelism"
            )


def test_without_processes_the_message_says_what_to_do():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    shard(optimizer)
    with pytest.raises(RuntimeError, match="there is no process group: start the program with torchrun"):
        optimizer.step()


# Users' own loops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_groups_without_names_and_rates_as_tensors(found, layout):
    """One group comes later; one parameter never has a gradient."""
    for facts in found:
        one, many = facts["groups", "alone"], facts["groups", layout]
        assert many["same owners"] and many["gradients are there"] and many["groups are the same"]
        assert distance_of_weights(many, one) <= (0 if layout == "replicated" else TOLERANCE)
        assert many["closure"] == (
            "step(closure) would compute gradients after they were divided among ranks; call the closure before"
        )


def distance_of_weights(ours, theirs):
    return distance({"losses": [], **ours}, {"losses": [], **theirs})


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize(("adam", "gradient"), [(True, "zero"), (False, "zero"), (False, "one"), (True, "all")])
def test_a_first_step_at_rate_0_counts_unless_all_gradients_are_0(found, layout, adam, gradient):
    """On all ranks alike, also on those that own no matrix, or only gradients that are 0."""
    for facts in found:
        one, many = facts["rest", "alone", adam, gradient], facts["rest", layout, adam, gradient]
        assert one["counted"] == {float(gradient != "zero")}
        assert distance_of_weights(many, one) <= (0 if layout == "replicated" else TOLERANCE)
    counted = [facts["rest", layout, adam, gradient]["counted"] for facts in found]
    assert [bool(some) for some in counted] == ([True] * 4 if adam else [True, True, False, False])
    assert set().union(*counted) == one["counted"]


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("name", ["alice", "galore_8bit", "any"])
def test_state_dicts_continue_bit_for_bit(found, layout, name):
    assert all(facts["reload", layout, name] for facts in found)


@pytest.mark.parametrize("name", ["alice", "galore_8bit", "any"])
def test_gathered_states_continue_bit_for_bit_on_four_processes_and_on_one(found, name):
    for rank, facts in enumerate(found):
        saved = facts["saved by one"]
        assert saved[name, "ranks with a state dict"] == (rank == 0)
        assert saved[name, "replicated"] and saved[name, "alone"]
        # the others' states are not kept: of 5 matrices each rank has its own, and all have the Adam group's
        assert saved[name, "replicated", "states"] < saved[name, "alone", "states"] == saved["alice", "alone", "states"]


@pytest.mark.parametrize("name", ["alice", "galore_8bit", "any"])
def test_the_share_of_one_rank_is_not_taken_for_the_whole(found, name):
    """Saved as people do, optimizer.state_dict() on the first rank; without its mark, states that are lacking are told of."""
    for rank, facts in enumerate(found):
        saved = facts["saved by one"]
        assert "save shard(optimizer).gather()" in saved[name, "alone", "share"]
        assert bool(saved[name, "replicated", "share"]) == (rank != 0)
        assert ("they begin anew" in saved[name, "replicated", "warning"]) == (rank != 0)


def test_an_optimizer_that_was_given_shards_afterwards_divides_itself(found):
    assert all(facts["divided afterwards"] for facts in found)


def test_a_step_without_any_gradient_is_told_of(recwarn):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    optimizer = create("racs", model, verbose=False)
    model(torch.ones(2, 6)).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.step()
    assert "after the model was sharded or moved" in str(recwarn.pop().message)
    for p, G in zip(model.parameters(), gradients, strict=True):
        p.grad = G
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert not recwarn.list


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
def test_torchs_distributed_checkpoints_continue_bit_for_bit(found, layout, flat):
    assert all(facts["dcp", layout, flat] for facts in found)


def test_torchs_distributed_checkpoint_of_four_ranks_opens_on_two(found):
    for facts in found:
        assert distance_of_weights({"weights": facts["on two"]}, {"weights": facts["on one"]}) < TOLERANCE


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_step_that_fails_leaves_everything_in_its_place(found, layout):
    """All ranks own a matrix, and all have caught the error and gone on."""
    first = found[0]["fails"][layout, "weights"]
    for facts in found:
        many = {key: x for (where, key), x in facts["fails"].items() if where == layout}
        assert "Sophia needs an estimate" in many["error"] and many["gradients"] and many["groups"]
        assert sharded.same(many["weights"], first)
    assert not sharded.same(first, sharded.weights(sharded.Network(torch.float64)))


def test_classes_of_others(found):
    """A class whose step calls its parent's, one that fails and goes on, one that makes states before its first step."""
    alone = found[0]["strangers", "alone"]
    assert alone["error"] == "not today" and alone["states"] == 5
    assert sum(facts["strangers", "replicated"]["states"] for facts in found) == 5  # each matrix's on its owner alone
    for facts in found:
        replicated, divided = facts["strangers", "replicated"], facts["strangers", "sharded"]
        assert replicated["error"] == divided["error"] == "not today"
        for ours in (replicated, divided):
            assert distance_of_weights({"weights": ours["moody"]}, {"weights": alone["moody"]}) < TOLERANCE
        assert sharded.same(replicated["adagrad"], alone["adagrad"])
        assert "has made states for the shards of matrices" in divided["refusal"]


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_divided_optimizer_is_not_copied(found, layout):
    for facts in found:
        assert "copy state_dict()" in facts["strangers", layout]["copy"]


def test_who_owns_a_matrix_goes_on_owning_it():
    first = assign([1, 5, 3, 3], 2)
    again = assign([1, 5, 3, 3, 9, 9], 2, dict(enumerate(first)))
    assert again[:4] == first and sorted(again[4:]) == [0, 1]
