"""Attention logits: what is computed, what the Trainer logs, and what is refused."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM, TrainingArguments
from transformers.modeling_utils import AttentionInterface

from hf_muon import AttentionLogitsCallback
from hf_muon.analysis.attention import Visible, attention_logits, logit_bound
from hf_muon.integrations import attention

from . import tiny, tiny_moonlight
from .distributed.worker import SequentialTrainer

GET_INTERFACE = AttentionInterface.get_interface


def by_hand(query, key, scaling, allowed):
    """Every logit at once, in float64: largest per head, share above 100."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query.double() @ key.double().mT) * scaling
    allowed = allowed.expand_as(logits)
    return (
        logits.masked_fill(~allowed, -math.inf).amax((0, 2, 3)),
        int((logits[allowed] > 100).sum()),
        int(allowed.sum()),
    )


def random(batch=2, heads=4, groups=2, length=13, size=8, spread=6.0):
    torch.manual_seed(0)
    return torch.randn(batch, heads, length, size) * spread, torch.randn(batch, groups, length, size) * spread


CAUSAL = torch.ones(13, 13).tril().bool()
PADDING = torch.tensor([[1] * 13, [0] * 4 + [1] * 9])  # padded on the left
BOTH = CAUSAL & PADDING.bool()[:, None, None, :] & PADDING.bool()[:, None, :, None]
SEGMENTS = torch.tensor([[0] * 5 + [1] * 8])
MINIMUM = torch.finfo(torch.float32).min
CASES = {
    "everything": (Visible(), torch.ones(13, 13).bool()),
    "causal": (Visible(causal=True), CAUSAL),
    "padded": (Visible(causal=True, keys=PADDING), BOTH),
    "dense": (Visible(dense=CAUSAL & PADDING.bool()[:, None, None, :]), BOTH),
    "additive": (Visible(dense=torch.where(CAUSAL & PADDING.bool()[:, None, None, :], -3.0, MINIMUM)), BOTH),
    "packed": (Visible(causal=True, segments=SEGMENTS), CAUSAL & (SEGMENTS.mT == SEGMENTS)),
    "window": (Visible(causal=True, window=4), CAUSAL & CAUSAL.mT.logical_not().tril(3).logical_or(torch.eye(13).bool())
               & torch.ones(13, 13).triu(-3).bool()),
    "flex": (Visible(function=lambda b, h, q, k: (q >= k) & PADDING.bool()[b, k]), BOTH),
}  # fmt: skip


@pytest.mark.parametrize("budget", [1, 600, 2**24])
@pytest.mark.parametrize("case", CASES)
def test_chunked_logits_equal_all_logits_at_once(case, budget):
    query, key = random()
    visible, allowed = CASES[case]
    largest, above, total = by_hand(query, key, 0.4, allowed)
    found = attention_logits(query, key, scaling=0.4, visible=visible, budget=budget)
    assert torch.allclose(found.largest.double(), largest, rtol=1e-5)
    assert (int(found.above), int(found.total)) == (above, total) and above > 0
    assert (logit_bound(query, key, scaling=0.4) >= found.largest).all()


@pytest.mark.parametrize("budget", [1, 400, 2**24])
@pytest.mark.parametrize("offset", [5, -3])
def test_more_keys_or_fewer_than_queries_are_aligned_at_the_end(offset, budget):
    query, key = random()
    if offset > 0:
        query = query[:, :, offset:]
    else:
        key = key[:, :, -offset:]
    allowed = torch.ones(query.shape[2], key.shape[2]).tril(offset).bool()
    largest, above, total = by_hand(query, key, 0.4, allowed)
    found = attention_logits(query, key, scaling=0.4, visible=Visible(causal=True, offset=offset), budget=budget)
    assert torch.allclose(found.largest.double(), largest, rtol=1e-5)
    assert (int(found.above), int(found.total)) == (above, total) and above > 0


def test_heads_that_do_not_divide_and_a_scaling_that_is_not_positive_are_refused():
    query, key = random()
    with pytest.raises(ValueError, match="3 query heads do not divide over 2 key heads"):
        attention_logits(query[:, :3], key)
    with pytest.raises(ValueError, match="scaling must be positive, got -1.0"):
        attention_logits(query, key, scaling=-1.0)


def test_logits_of_half_precision_are_summed_in_float32():
    query, key = (x.bfloat16() for x in random())
    largest, _, _ = by_hand(query.float(), key.float(), 8**-0.5, CAUSAL)
    found = attention_logits(query, key, visible=Visible(causal=True))
    assert torch.allclose(found.largest.double(), largest, rtol=1e-5)


def test_under_autocast_queries_are_rounded_as_the_kernel_rounds_them():
    query, key = random()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_logits(query, key)
    assert torch.equal(found.largest, attention_logits(query.bfloat16(), key.bfloat16()).largest)


def big(model, factor=12.0):
    """Weights that make logits pass 100."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("q_proj.", "k_proj.", "kv_b_proj.", "c_attn.")):
                p.mul_(factor)
    return model


MODELS = {
    "gqa": lambda: big(tiny.qwen2(), 80),
    "mla": lambda: big(tiny_moonlight.model(), 200),
    "plain": lambda: big(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=264,
                n_positions=64,
                n_embd=32,
                n_layer=2,
                n_head=4,
                attn_pdrop=0,
                resid_pdrop=0,
                embd_pdrop=0,
            )
        ),
        16,
    ),
}


class Spy:
    """Keeps what each layer's attention was given."""

    def __init__(self):
        self.calls = []

    def see(self, module, implementation, query, key, mask, options):
        self.calls.append((module, implementation, query.detach(), key.detach(), mask, options))


def forward(model, ids, **inputs):
    spy = Spy()
    attention.watch(spy)
    with torch.no_grad():
        model.train()(input_ids=ids, **inputs)
    attention.unwatch(spy)
    return spy.calls


def measure(calls):
    out = []
    for module, implementation, query, key, mask, options in calls:
        visible = attention.visible_keys(module, implementation, query, key, mask, options)
        out.append(attention_logits(query, key, scaling=options.get("scaling"), visible=visible))
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_whose_softmax_the_eager_model_returns(kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 256, (2, 11))
    calls = forward(model, ids)
    model.eval()
    weights = model(input_ids=ids, output_attentions=True).attentions
    assert len(calls) == len(weights) == model.config.num_hidden_layers
    for (_, _, query, key, mask, options), probabilities in zip(calls, weights, strict=True):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = (query @ key.mT * options["scaling"]).masked_fill(mask < -1, -math.inf)
        assert torch.allclose(logits.softmax(-1), probabilities, atol=1e-5)


def inputs(kind):
    """A padded batch, and two packed sequences."""
    torch.manual_seed(1)
    if kind == "padded":
        mask = torch.ones(3, 16, dtype=torch.long)
        mask[1, 10:] = 0
        mask[2, :5] = 0
        return {"ids": torch.randint(0, 256, (3, 16)), "attention_mask": mask}
    positions = torch.tensor([[*range(7), *range(9)]])
    return {"ids": torch.randint(0, 256, (1, 16)), "position_ids": positions}


def nothing(module, query, key, value, mask, **options):
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("family", ["gqa", "mla"])
def test_eager_sdpa_flex_and_flash_attention_give_the_same_numbers(family, kind, monkeypatch):
    given = {}
    for implementation in ("eager", "sdpa", "flex_attention", "flash_attention_2"):
        model = MODELS[family]()
        # FlashAttention has no CPU kernel: the model makes its mask and arguments for it, and nothing is attended.
        model.config._attn_implementation = implementation
        for name in ("flash_attention_2", "flex_attention"):
            monkeypatch.setitem(AttentionInterface._global_mapping, name, nothing)
        calls = forward(model, **{"use_cache": False, **inputs(kind)})
        kinds = {type(mask) for *_, mask, _ in calls}
        given[implementation] = kinds
        # Only the first layer's queries do not depend on what attention returned.
        first = measure(calls)[0]
        numbers = (first.largest, int(first.above), int(first.total))
        if implementation == "eager":
            expected = numbers
        assert torch.allclose(numbers[0], expected[0], rtol=1e-4)
        assert numbers[1:] == expected[1:] and expected[1] > 0
    assert given["flex_attention"] == {BlockMask}
    assert len(set(map(frozenset, given.values()))) > 1


def trainer(tmp_path, steps, model=None, callbacks=None, **options):
    args = TrainingArguments(
        **tiny.arguments(tmp_path, **{"max_steps": 4, "per_device_train_batch_size": 4, **options})
    )
    made = callbacks if callbacks is not None else [AttentionLogitsCallback(steps)]
    return SequentialTrainer(model=model or MODELS["gqa"](), args=args, train_dataset=tiny.tokens(), callbacks=made)


def logged(run):
    run.train()
    return [
        {k: v for k, v in row.items() if k.startswith("attention/")} for row in run.state.log_history if "loss" in row
    ]


def test_the_trainer_logs_the_logits_of_the_forward_before_the_step(tmp_path):
    rows = logged(trainer(tmp_path, 2))
    assert [bool(row) for row in rows] == [False, True, False, True]
    assert set(rows[1]) == {
        "attention/max_logit",
        "attention/share_above_100",
        *(f"attention/max_logit/{i}" for i in "01"),
    }
    run = trainer(tmp_path, 1, learning_rate=0.0, optim="adamw_torch", weight_decay=0.0)
    ids = torch.tensor([row["input_ids"] for row in tiny.tokens()[:4]])
    layers = measure(forward(MODELS["gqa"](), ids))
    row = logged(run)[0]
    for i, layer in enumerate(layers):
        assert row[f"attention/max_logit/{i}"] == pytest.approx(float(layer.largest.max()), rel=1e-5)
    assert row["attention/max_logit"] == pytest.approx(max(float(x.largest.max()) for x in layers), rel=1e-5)
    share = sum(int(x.above) for x in layers) / sum(int(x.total) for x in layers)
    assert row["attention/share_above_100"] == share > 0


def test_accumulation_and_gradient_checkpointing_change_no_number(tmp_path):
    frozen = dict(learning_rate=0.0, max_steps=1, optim="adamw_torch", weight_decay=0.0)
    (one,) = logged(trainer(tmp_path, 1, **frozen))
    (many,) = logged(trainer(tmp_path, 1, per_device_train_batch_size=1, gradient_accumulation_steps=4, **frozen))
    for reentrant in (True, False):
        again = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        (checkpointed,) = logged(trainer(tmp_path, 1, **frozen, **again))
        assert checkpointed == one
    assert many == pytest.approx(one, rel=1e-5)
    assert many["attention/share_above_100"] == one["attention/share_above_100"] > 0


def test_nothing_is_watched_between_measured_steps_and_after_training(tmp_path):
    class Looks(AttentionLogitsCallback):
        seen = ()

        def on_substep_end(self, *args, **kwargs):
            self.seen += (AttentionInterface.get_interface is not GET_INTERFACE,)

    callback = Looks(3)
    trainer(tmp_path, 0, callbacks=[callback], gradient_accumulation_steps=2).train()
    assert callback.seen == (False, False, True, False)
    assert AttentionInterface.get_interface is GET_INTERFACE


def test_watching_leaves_training_as_it_is(tmp_path):
    a, b = trainer(tmp_path, 1), trainer(tmp_path, 1, callbacks=[])
    a.train(), b.train()
    for (name, x), y in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y), name


def test_evaluation_is_not_measured(tmp_path):
    run = trainer(tmp_path, 1, max_steps=1)
    seen = []
    run.callback_handler.callbacks[-1].see = lambda *a: seen.append(a[0].training)
    attention.watch(run.callback_handler.callbacks[-1])
    run.model.eval()(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert not seen


def gptj():
    return GPTJForCausalLM(GPTJConfig(vocab_size=264, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4))


def test_what_cannot_be_observed_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    run = trainer(tmp_path, 5, gptj())
    with pytest.raises(ValueError, match="attention of GPTJForCausalLM cannot be observed.*Remedy"):
        run.train()
    assert run.state.global_step == 0
    with pytest.raises(ValueError, match="torch_compile hides from attention_logits_steps"):
        trainer(tmp_path, 5, torch_compile=True).train()
    model = MODELS["gqa"]()
    monkeypatch.setitem(AttentionInterface._global_mapping, "own", AttentionInterface._global_mapping["sdpa"])
    model.config._attn_implementation = "own"
    with pytest.raises(ValueError, match="Qwen2Attention attends with 'own'"):
        trainer(tmp_path, 1, model).train()
    with pytest.raises(ValueError, match="attention_logits_steps must be a positive integer, got 0"):
        AttentionLogitsCallback(0)
    attention._watchers.clear()
    AttentionInterface.get_interface, attention._patch = GET_INTERFACE, None


def test_attention_that_a_kernel_has_replaced_is_an_error_in_the_first_measured_step(tmp_path):
    model = MODELS["gqa"]()
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(RuntimeError, match="no attention was seen"):
        trainer(tmp_path, 1, model).train()


def test_layers_of_two_towers_are_told_apart_by_whole_names():
    names = ["encoder.layers.0.attn", "decoder.layers.0.attn", "decoder.layers.1.attn"]
    assert [attention.label(n, names) for n in names] == [*names[:2], "1"]
