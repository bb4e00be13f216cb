"""The estimates that Sophia gets, against the whole Hessian of a small model."""

import copy
import zlib

import pytest
import torch
from torch import nn

from optimizers import METHODS, Sophia, create
from pretraining import checkpoint
from pretraining.curvature import hutchinson, label_gradient
from pretraining.evaluation import IGNORE, row_losses
from pretraining.model import build_model

V, T = 5, 6
IDS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[1, 4:] = IGNORE


@pytest.fixture
def net():
    """Logits of ids through a table and a layer: nonlinear in both, small enough for its whole Hessian."""
    torch.manual_seed(1)
    table, out = nn.Parameter(torch.randn(V, 3).double()), nn.Parameter(torch.randn(V, 3).double())
    return (lambda ids: torch.tanh(table[ids]) @ out.mT), [table, out]


def summed_loss(table, out):
    return row_losses(torch.tanh(table[IDS]) @ out.mT, LABELS).sum()


def exact_diagonals(params):
    hessian = torch.func.hessian(lambda table, out: summed_loss(table, out), argnums=(0, 1))(*params)
    return [hessian[i][i].reshape(p.numel(), p.numel()).diagonal().view_as(p) for i, p in enumerate(params)], hessian


def test_an_estimate_serves_one_step():
    p = nn.Parameter(torch.zeros(3, 4))
    optimizer = Sophia([p], update_interval=1)
    p.grad = torch.ones_like(p)
    optimizer.update_estimate({p: torch.ones_like(p)})
    optimizer.step()
    with pytest.raises(ValueError, match="needs an estimate"):
        optimizer.step()


def test_one_hutchinson_sample_is_u_times_hessian_times_u(net):
    logits, params = net
    found = hutchinson(logits, [(IDS, LABELS)], params, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    u = [torch.randn(p.shape, generator=generator).double() for p in params]
    _, hessian = exact_diagonals([p.detach() for p in params])
    for i, p in enumerate(params):
        product = sum(torch.tensordot(hessian[i][j], u[j], dims=2) for j in range(2))
        torch.testing.assert_close(found[i].double(), u[i] * product, rtol=1e-5, atol=1e-5)
        assert found[i].dtype == torch.float32 and found[i].shape == p.shape


def test_hutchinson_is_right_on_average_and_does_not_depend_on_micro_batches(net):
    logits, params = net
    exact, _ = exact_diagonals([p.detach() for p in params])
    draws = 1500
    mean = [torch.zeros_like(p) for p in params]
    generator = torch.Generator().manual_seed(3)
    for _ in range(draws):
        for total, sample in zip(mean, hutchinson(logits, [(IDS, LABELS)], params, generator), strict=True):
            total += sample / draws
    for found, wanted in zip(mean, exact, strict=True):
        assert (found - wanted).abs().max() < 0.25 * wanted.abs().max()

    whole, split = (
        hutchinson(logits, pieces, params, torch.Generator().manual_seed(7))
        for pieces in ([(IDS, LABELS)], [(IDS[:1], LABELS[:1]), (IDS[1:], LABELS[1:])])
    )
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b)


def test_drawn_labels_give_the_expected_gradient_and_the_gauss_newton_diagonal(net):
    """E[g] = 0 and E[g g] = diag(Gauss-Newton) for the summed loss of drawn labels (Bartlett's identities)."""
    logits, params = net
    draws = 3000
    generator = torch.Generator().manual_seed(3)
    mean, square = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for _ in range(draws):
        for i, g in enumerate(label_gradient(logits, [(IDS, LABELS)], params, generator)):
            mean[i] += g / draws
            square[i] += g.double().square() / draws
    used = LABELS[:, 1:] != IGNORE
    jacobians = torch.func.jacrev(lambda table, out: (torch.tanh(table[IDS]) @ out.mT)[:, :-1][used], argnums=(0, 1))(
        *[p.detach() for p in params]
    )
    p = logits(IDS)[:, :-1][used].detach().softmax(-1)
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    for i, J in enumerate(jacobians):
        J = J.flatten(2)
        wanted = torch.einsum("tak,tab,tbk->k", J, H, J).view_as(params[i])
        assert (square[i] - wanted).abs().max() < 0.15 * wanted.abs().max()
        assert mean[i].abs().max() < 5 * (wanted.max() / draws) ** 0.5


def test_where_the_model_is_certain_the_drawn_label_is_its_own(net):
    _, (table, out) = net
    sure = lambda ids: 50 * nn.functional.one_hot((ids + 1) % V, V).double() + 0 * (table.sum() + out.sum())  # noqa: E731
    found = label_gradient(sure, [(IDS, LABELS)], [table, out], torch.Generator().manual_seed(0))
    assert all(g.abs().max() < 1e-12 for g in found)


@pytest.mark.parametrize("name", ["sophia_h", "sophia_g"])
def test_the_trainer_averages_over_targets(name, tmp_path):
    """Hutchinson's estimate is of the mean loss; Gauss-Newton-Bartlett's is B g g for the gradient g of the mean loss."""
    from pretraining.config import compose, validate
    from pretraining.trainer import Trainer, make_plan

    cfg = compose(["experiment=quickstart", "model.hidden_size=16", "model.intermediate_size=24", "data.length=16",
                   "model.num_hidden_layers=1", "model.num_attention_heads=2", "trainer.precision=fp32", "seed=5",
                   "trainer.batch_size=6", "trainer.micro_batch_size=4", "data.validation_max_tokens=500",
                   "eval.ngrams=false", f"optimizer={name}", f"run_dir={tmp_path}/run"])  # fmt: skip
    validate(cfg)
    trainer = Trainer(cfg, make_plan(cfg))
    rows = next(trainer.batches)
    B = int((rows["labels"][:, 1:] != IGNORE).sum())
    given = {}
    trainer.optimizer.update_estimate = given.update
    trainer._estimate_curvature(rows, torch.tensor(B))
    trainer.batches.close()

    params = trainer.optimizer.param_groups[0]["params"]
    assert list(given) == params and B > 6
    generator = torch.Generator().manual_seed(zlib.crc32(b"5/0/0"))
    pieces = [(rows["input_ids"][i], rows["labels"][i]) for i in (slice(0, 4), slice(4, 6))]
    estimator = hutchinson if name == "sophia_h" else label_gradient
    summed = estimator(lambda ids: trainer.model(input_ids=ids).logits, pieces, params, generator)
    for p, total in zip(params, summed, strict=True):
        wanted = total / B if name == "sophia_h" else B * (total / B).square()
        torch.testing.assert_close(given[p], wanted)


def llama():
    torch.manual_seed(0)
    from pretraining.config import compose

    cfg = compose(["experiment=quickstart", "model.hidden_size=32", "model.intermediate_size=48",
                   "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.vocab_size=64"])  # fmt: skip
    return build_model(cfg.model, device="cpu", dtype=torch.float32)


def train(model, optimizer, steps, start=0):
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(64, (10, 2, 8), generator=generator)
    for k in range(start, start + steps):
        optimizer.zero_grad()
        row_losses(model(input_ids=batches[k]).logits, batches[k]).sum().backward()
        if getattr(optimizer, "wanted_estimate", lambda: None)():
            params = [p for group in optimizer.param_groups if "estimator" in group for p in group["params"]]
            pieces = [(batches[k], batches[k])]
            logits = lambda ids: model(input_ids=ids).logits  # noqa: E731
            found = hutchinson(logits, pieces, params, torch.Generator().manual_seed(k))
            assert all(torch.isfinite(x).all() for x in found)
            optimizer.update_estimate(dict(zip(params, found, strict=True)))
        optimizer.step()


@pytest.mark.parametrize("name", METHODS)
def test_checkpoints_of_every_method_go_on_bit_for_bit(name, tmp_path):
    options = {"rank": 4, "leading": 2, "update_interval": 2}
    takes = METHODS[name][0]
    known = takes.__init__.__kwdefaults__ if isinstance(takes, type) else {}
    options = {key: value for key, value in options.items() if key in (known or {})}
    if name == "any":  # keeps averages in its parameter groups
        options = {"target": "pytorch_optimizer.ScheduleFreeAdamW"}
    if name == "adam_8bit":  # or these small tensors stay in float32
        options = {"min_8bit_size": 1}
    options |= {"lr": 0.01, "adam_lr": 0.01, "verbose": False}

    model = llama()
    optimizer = create(name, model, **options)
    train(model, optimizer, 3)
    saved = checkpoint.save(tmp_path, 3, model, optimizer, {"optimizer": {}}, keep_last=1)
    resumed = llama()
    for p in resumed.parameters():
        p.data.zero_()
    other = create(name, resumed, **copy.deepcopy(options))
    checkpoint.load(saved, resumed, other, {"optimizer": {}})
    train(model, optimizer, 4, start=3)
    train(resumed, other, 4, start=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
