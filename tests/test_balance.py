"""Expert balancing: its sign, what is counted, and the bias's dtype, on a small model of Moonlight's architecture."""

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_muon.integrations.moe import ExpertBalanceCallback
from hf_muon.moonlight.balance import BIAS, ExpertBalancer, bias_update, max_violation

from . import tiny, tiny_moonlight


def routers(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, BIAS)}


def batch(seed=0, rows=4, length=16):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_update_equals_the_papers_formula_by_hand():
    load = torch.tensor([[10, 0, 1, 1], [3, 3, 3, 3]])
    # Mean 3: e = (-, +, +, +), mean of signs 1/2. Balanced: no sign at all.
    expected = [[-1.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]]
    assert bias_update(load, 1e-3).tolist() == [pytest.approx([1e-3 * x for x in row]) for row in expected]
    assert max_violation(load).tolist() == [pytest.approx(7 / 3), 0]


def test_an_overloaded_expert_loses_load_and_the_layer_balances():
    model = tiny_moonlight.model().train()
    router = next(iter(routers(model).values()))
    getattr(router, BIAS)[0] = 0.5  # chosen for every token: scores are sigmoids within 0.5 of each other
    balancer, history = ExpertBalancer(model), []
    name = next(iter(balancer.routers))
    ids = batch(rows=16, length=32)
    with torch.no_grad():
        for rate in [1e-2] * 100 + [1e-3] * 50:
            model(ids)
            history.append(balancer._load[name][0].item())
            balancer.step(rate)
    share = ids.numel() * 2 / 8
    assert history[0] == ids.numel()
    assert max(history[-20:]) < 1.2 * share
    assert balancer.metrics()["moe/max_violation/1"] < 0.2
    # The other sign would keep it where it was: at its most.
    assert getattr(router, BIAS)[0] < 0.1


def counted(run, model, **checkpointing):
    """The load of the first router after ``run(model)``."""
    model.train()
    balancer = ExpertBalancer(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    run(model)
    return next(iter(balancer._load.values()))[:-1]


def by_hand(model, ids):
    """How often each expert of the first MoE layer is among the chosen, from its scores."""
    seen = []
    handle = next(iter(routers(model).values())).register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    router = next(iter(routers(model).values()))
    scores = torch.sigmoid(seen[0].flatten(0, -2) @ router.weight.T) + getattr(router, BIAS)
    return torch.bincount(scores.argsort(dim=-1, descending=True)[:, :2].flatten(), minlength=8)


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_every_token_is_counted_once_with_activation_checkpointing_too(checkpointing):
    ids, calls = batch(), []

    def run(model):
        next(iter(routers(model).values())).register_forward_hook(lambda *_: calls.append(1))
        if checkpointing.get("use_reentrant"):
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()

    model = tiny_moonlight.model()
    load = counted(run, model, **checkpointing)
    assert len(calls) == (2 if checkpointing else 1), "the second forward that must not count"
    assert torch.equal(load, by_hand(tiny_moonlight.model(), ids))


def test_evaluation_is_not_counted():
    ids = batch()

    def run(model):
        model(ids)
        model.eval()
        model(batch(1))

    assert torch.equal(counted(run, tiny_moonlight.model()), by_hand(tiny_moonlight.model(), ids))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_bias_stays_float32_and_exact_when_the_model_is_cast(cast):
    model = tiny_moonlight.model()
    balancer = ExpertBalancer(model)
    bias = getattr(next(iter(routers(model).values())), BIAS)
    bias.copy_(torch.linspace(0.9, 1.1, 8))
    expected = bias.clone()
    model.to(cast)
    copied = copy.deepcopy(model).float().to(cast)
    for m in (model, copied):
        found = getattr(next(iter(routers(m).values())), BIAS)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert next(iter(routers(m).values())).weight.dtype == cast
    model.train()(batch())
    balancer.step(1e-3)
    moved = getattr(next(iter(routers(model).values())), BIAS) - expected
    # In bfloat16, whose numbers near 1 are 1/128 apart, nothing would have moved.
    assert 0 < moved.abs().max() < 2.1e-3
    assert torch.equal(getattr(next(iter(routers(copied).values())), BIAS), expected), "a copy is on its own"


def test_bias_survives_saving_and_loading_in_bfloat16(tmp_path):
    model = tiny_moonlight.model()
    getattr(next(iter(routers(model).values())), BIAS).copy_(torch.linspace(0.9, 1.1, 8))
    model.to(torch.bfloat16)
    ExpertBalancer(model)
    getattr(next(iter(routers(model).values())), BIAS).copy_(torch.linspace(0.9, 1.1, 8))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(getattr(next(iter(routers(loaded).values())), BIAS), torch.linspace(0.9, 1.1, 8))


class Loads(TrainerCallback):
    """What the balancer held before each update, and how often biases changed."""

    def __init__(self, balancer):
        self.balancer, self.loads, self.biases = balancer, [], []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.loads.append(torch.stack(list(self.balancer._load.values()))[:, :-1])

    def on_substep_end(self, args, state, control, **kwargs):
        self.biases.append(self.bias())

    def on_step_end(self, args, state, control, **kwargs):
        self.biases.append(self.bias())

    def bias(self):
        return torch.stack([getattr(r, BIAS) for r in self.balancer.routers.values()]).clone()


def train(tmp_path, rate=1e-3, steps=3, **options):
    model = tiny_moonlight.model()
    balance = ExpertBalanceCallback(model, rate)
    watch = Loads(balance.balancer)
    defaults = dict(max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    args = TrainingArguments(**tiny.arguments(tmp_path, **{**defaults, **options}))
    data = tiny.tokens(rows=40)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:4], callbacks=[watch, balance])
    trainer.train()
    return trainer, watch


def test_trainer_moves_biases_once_per_optimizer_step_by_the_whole_steps_load(tmp_path):
    _, watch = train(tmp_path, eval_strategy="steps", eval_steps=1, gradient_checkpointing=True)
    watch.biases.append(watch.bias())
    assert len(watch.loads) == 3
    # 3 micro-batches x 2 rows x 16 tokens x 2 experts per token, whatever the evaluation and the recomputation saw.
    assert all((load.sum(dim=-1) == 3 * 2 * 16 * 2).all() for load in watch.loads)
    expected = torch.zeros(2, 8)
    for step, load in enumerate(watch.loads):
        # `watch` comes before the balancer: at the step's own end, the bias is still that of the step before.
        for seen in watch.biases[3 * step : 3 * step + 3]:
            assert torch.equal(seen, expected)
        expected = expected + bias_update(load, 1e-3)
    assert torch.equal(watch.biases[-1], expected)
    assert expected.abs().max() > 1e-3


def test_trainer_logs_the_violation_of_every_layer_and_their_mean(tmp_path):
    trainer, watch = train(tmp_path)
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 3
    for row, load in zip(logs, watch.loads, strict=True):
        first, second = max_violation(load).tolist()
        assert [row["moe/max_violation/1"], row["moe/max_violation/2"]] == [first, second]
        assert row["moe/max_violation"] == pytest.approx((first + second) / 2)
        assert row["moe/max_bias"] > 0


def test_at_rate_zero_biases_stay_and_the_violation_is_logged(tmp_path):
    rates = {0: 1e-3, 1: 0.0, 2: 0.0}
    trainer, watch = train(tmp_path, rate=rates.get, optim="adamw_torch")
    assert watch.loads[0].any()
    assert torch.equal(watch.bias(), bias_update(watch.loads[0], 1e-3))
    assert all("moe/max_violation" in row for row in trainer.state.log_history if "loss" in row)


class ChosenByHand(torch.nn.Module):
    """A router that chooses what it is told."""

    def __init__(self):
        super().__init__()
        self.register_buffer(BIAS, torch.zeros(4))

    def forward(self, chosen):
        return None, chosen.float(), chosen


def _rank(rank, store, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = ChosenByHand()
    balancer = ExpertBalancer(model)
    # Rank 0 alone would lower expert 0 and raise 1; together 0 and 1 have too much, and 1 has the most.
    for chosen in ([[0, 0], [0, 1]], [[1, 1], [1, 1]])[rank] * 2:
        model(torch.tensor([chosen]))
    balancer.step(1e-3)
    torch.save((getattr(model, BIAS), balancer.metrics()), f"{out}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_move_biases_by_their_common_load(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(tmp_path / "store", tmp_path), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    load = torch.tensor([2 * 3, 2 * 5, 0, 0])
    for bias, metrics in results:
        assert torch.equal(bias, bias_update(load, 1e-3))
        assert metrics["moe/max_violation"] == (10 - 4) / 4


def test_what_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match="no router"):
        ExpertBalancer(tiny.qwen2())
    balancer = ExpertBalancer(tiny_moonlight.model())
    with pytest.raises(RuntimeError, match="chose no expert"):
        balancer.step()
    model = tiny_moonlight.model().train()
    balancer = ExpertBalancer(model)
    model(batch())
    balancer._load[next(iter(balancer.routers))][-1] = 1
    with pytest.raises(RuntimeError, match="expert parallelism"):
        balancer.step()
    assert all((getattr(r, BIAS) == 0).all() for r in balancer.routers.values())
