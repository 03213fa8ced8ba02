"""Routing of small real models: exact kinds and layouts, overrides, groups, and every error with its remedy."""

import math

import pytest
import torch
import transformers as hf
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from hf_muon import MatrixLayout, Muon, MuonConfig, explain, param_groups
from hf_muon.routing import route

from . import tiny

SMALL = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
ROPE = dict(max_position_embeddings=64, intermediate_size=48)


def routed(model, **options):
    return {r.name: r for r in route(model, MuonConfig(**options))}


def pieces(found, ending):
    """(blocks, sizes, dim, transposed) of the only layout under names that end so."""
    layouts = {r.layout for name, r in found.items() if name.endswith(ending)}
    assert len(layouts) == 1, layouts
    layout = layouts.pop()
    return layout.blocks, layout.sizes, layout.dim, layout.transposed


def kinds(found, algorithm):
    return {r.kind for r in found.values() if r.algorithm == algorithm}


def causal(config, **options):
    return routed(hf.AutoModelForCausalLM.from_config(config), **options)


def llama(**changes):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **ROPE, **changes))


class TestFamilies:
    @pytest.mark.parametrize("config", [hf.LlamaConfig, hf.Qwen2Config], ids=["llama", "qwen2"])
    def test_plain_decoder(self, config):
        model = hf.AutoModelForCausalLM.from_config(config(**SMALL, **ROPE))
        found = routed(model)
        assert set(found) == {n for n, _ in model.named_parameters()}
        for name, r in found.items():
            leaf = name.split(".")[-2]
            expected = {
                "embed_tokens": "embedding", "lm_head": "head", "norm": "norm", "input_layernorm": "norm",
                "post_attention_layernorm": "norm", "q_proj": "attention", "k_proj": "attention", "v_proj": "attention",
                "o_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
            }[leaf]  # fmt: skip
            expected = "bias" if name.endswith("bias") else expected
            assert r.kind == expected, name
            assert (r.algorithm == "muon") == (expected in ("attention", "mlp"))
            if r.algorithm == "muon":
                assert r.layout == MatrixLayout(tuple(r.parameter.shape))

    def test_gpt2_conv1d_is_cut_on_columns(self):
        found = causal(hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))
        assert pieces(found, "attn.c_attn.weight") == (1, (32, 32, 32), 1, True)
        assert pieces(found, "mlp.c_fc.weight") == (1, (), 0, True)
        assert found["transformer.wte.weight"].tied == ("lm_head.weight",)
        assert found["transformer.wpe.weight"].kind == "embedding"

    def test_gpt2_cross_attention_holds_keys_and_values(self):
        config = hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64, add_cross_attention=True)
        assert pieces(causal(config), "crossattention.c_attn.weight") == (1, (32, 32), 1, True)

    def test_gpt_neox_is_interleaved_by_head(self):
        config = hf.GPTNeoXConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        assert pieces(causal(config), "query_key_value.weight") == (4, (8, 8, 8), 0, False)

    def test_bloom_is_interleaved_by_head(self):
        config = hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
        assert pieces(causal(config), "query_key_value.weight") == (4, (8, 8, 8), 0, False)

    @pytest.mark.parametrize(
        ("variant", "expected"),
        [
            (dict(multi_query=True, new_decoder_architecture=False), (1, (32, 8, 8))),
            (dict(multi_query=False, new_decoder_architecture=False), (4, (8, 8, 8))),
            (dict(new_decoder_architecture=True, num_kv_heads=2), (2, (16, 8, 8))),
        ],
        ids=["multi-query", "multi-head", "grouped"],
    )
    def test_falcon(self, variant, expected):
        config = hf.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **variant)
        assert pieces(causal(config), "query_key_value.weight")[:2] == expected

    @pytest.mark.parametrize(("multi_query", "expected"), [(True, (1, (32, 8, 8))), (False, (4, (8, 8, 8)))])
    def test_gpt_bigcode(self, multi_query, expected):
        config = hf.GPTBigCodeConfig(
            vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64, multi_query=multi_query
        )
        assert pieces(causal(config), "c_attn.weight")[:2] == expected

    def test_phi3_fuses_qkv_and_gate_up(self):
        found = causal(hf.Phi3Config(**SMALL, **ROPE, pad_token_id=0))
        assert pieces(found, "qkv_proj.weight") == (1, (32, 16, 16), 0, False)
        assert pieces(found, "gate_up_proj.weight") == (1, (48, 48), 0, False)

    def test_mixtral_experts_and_router(self):
        found = causal(hf.MixtralConfig(**SMALL, **ROPE, num_local_experts=4))
        gate_up = found["model.layers.0.mlp.experts.gate_up_proj"]
        assert (gate_up.kind, gate_up.layout) == ("experts", MatrixLayout((4, 96, 32), batch=1, sizes=(48, 48)))
        assert gate_up.layout.total() == 8
        assert found["model.layers.0.mlp.experts.down_proj"].layout == MatrixLayout((4, 32, 48), batch=1)
        assert found["model.layers.0.mlp.gate.weight"].kind == "router"

    def test_gpt_oss_is_transposed_and_interleaved(self):
        found = causal(hf.GptOssConfig(**SMALL, **ROPE, head_dim=8, num_local_experts=4))
        assert pieces(found, "experts.gate_up_proj") == (48, (1, 1), 1, True)
        assert pieces(found, "experts.down_proj") == (1, (), 0, True)
        assert found["model.layers.0.mlp.experts.gate_up_proj_bias"].kind == "bias"
        assert found["model.layers.0.mlp.router.weight"].kind == "router"

    def test_llama4_is_transposed_without_saying_so(self):
        config = hf.Llama4TextConfig(
            **SMALL, **ROPE, head_dim=8, num_local_experts=4, intermediate_size_mlp=64, interleave_moe_layer_step=1,
            pad_token_id=0,
        )  # fmt: skip
        found = causal(config)
        assert pieces(found, "experts.gate_up_proj") == (1, (48, 48), 1, True)
        assert pieces(found, "experts.down_proj") == (1, (), 0, True)

    def test_deepseek_v3_keeps_mla_whole(self):
        config = hf.DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4}, **ROPE,
            moe_intermediate_size=24, n_routed_experts=4, n_group=1, topk_group=1,
            num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=8,
        )  # fmt: skip
        found = causal(config)
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            assert pieces(found, f"{name}.weight") == (1, (), 0, False)
        assert kinds(found, "muon") == {"attention", "mlp", "experts", "shared_experts", "router"}
        assert found["model.layers.1.mlp.gate.weight"].kind == "router"

    def test_mamba(self):
        config = hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=8, time_step_rank=4)
        found = causal(config)
        assert pieces(found, "in_proj.weight") == (1, (64, 64), 0, False)
        assert pieces(found, "x_proj.weight") == (1, (4, 8, 8), 0, False)
        assert {r.kind for n, r in found.items() if n.endswith(("A_log", "conv1d.weight"))} == {"table", "conv"}
        assert {r.algorithm for n, r in found.items() if n.endswith(("A_log", "conv1d.weight"))} == {"adamw"}

    def test_vit(self):
        config = hf.ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32
        )
        found = routed(hf.ViTForImageClassification(config))
        assert kinds(found, "muon") == {"attention", "mlp"}
        assert found["classifier.weight"].kind == "head"
        assert {r.kind for n, r in found.items() if "patch_embeddings" in n and n.endswith("weight")} == {"embedding"}
        assert {r.algorithm for n, r in found.items() if "position_embeddings" in n or "cls_token" in n} == {"adamw"}

    def test_bert_classification_trains_the_pooler_and_not_the_classifier(self):
        config = hf.BertConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
        )
        found = routed(hf.BertForSequenceClassification(config))
        assert found["classifier.weight"].kind == "head"
        assert found["bert.pooler.dense.weight"].algorithm == "muon"
        assert {r.kind for n, r in found.items() if "embeddings" in n and n.endswith("embeddings.weight")} == {
            "embedding"
        }

    def test_t5(self):
        config = hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        found = routed(hf.T5ForConditionalGeneration(config))
        assert kinds(found, "muon") <= {"attention", "mlp"}
        assert {r.kind for n, r in found.items() if "relative_attention_bias" in n} == {"embedding"}
        assert "lm_head.weight" in found["shared.weight"].tied or found["lm_head.weight"].kind == "head"

    def test_whisper(self):
        config = hf.WhisperConfig(
            vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, pad_token_id=0, decoder_start_token_id=1,
        )  # fmt: skip
        found = routed(hf.WhisperForConditionalGeneration(config))
        assert found["model.encoder.conv2.weight"].kind == "conv"
        assert found["model.encoder.conv2.weight"].algorithm == "muon"
        assert found["model.encoder.conv1.weight"].kind == "embedding"  # what get_input_embeddings names
        assert {r.kind for n, r in found.items() if "embed_" in n} == {"embedding"}

    def test_reward_model_head_is_one_row(self):
        model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL, **ROPE, num_labels=1))
        assert routed(model)["score.weight"].algorithm == "adamw"
        three = hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL, **ROPE, num_labels=3))
        assert routed(three)["score.weight"].kind == "head"


class TestLora:
    @pytest.fixture
    def model(self):
        return llama()

    def adapted(self, model, **changes):
        changes = {"target_modules": ["q_proj", "up_proj"], **changes}
        return get_peft_model(model, LoraConfig(r=4, task_type=TaskType.CAUSAL_LM, **changes))

    def test_both_factors_by_default_and_b_on_request(self, model):
        peft = self.adapted(model)
        assert {r.algorithm for r in route(peft)} == {"muon"}
        only_b = {n: r.algorithm for n, r in routed(peft, lora="B").items()}
        assert all(("lora_B" in n) == (a == "muon") for n, a in only_b.items())
        assert {r.kind for r in route(peft)} == {"lora"}

    def test_rank_one_factors_are_vectors(self, model):
        with pytest.raises(ValueError, match="none of the"):
            route(get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"])))

    def test_b_of_a_fused_layer_is_cut_like_the_layer(self):
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL, **ROPE, pad_token_id=0))
        found = routed(self.adapted(model, target_modules=["qkv_proj", "gate_up_proj"]))
        assert pieces(found, "qkv_proj.lora_B.default.weight") == (1, (32, 16, 16), 0, False)
        assert pieces(found, "gate_up_proj.lora_B.default.weight") == (1, (48, 48), 0, False)
        assert pieces(found, "qkv_proj.lora_A.default.weight") == (1, (), 0, False)

    def test_b_of_a_conv1d_is_cut_on_rows(self):
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64))
        found = routed(self.adapted(model, target_modules=["c_attn"], fan_in_fan_out=True))
        assert pieces(found, "lora_B.default.weight") == (1, (32, 32, 32), 0, False)

    def test_embedding_factors_and_magnitudes_are_adamws(self, model):
        found = routed(self.adapted(model, target_modules=["q_proj", "embed_tokens"], use_dora=False))
        assert {r.algorithm for n, r in found.items() if "lora_embedding" in n} == {"adamw"}
        dora = routed(self.adapted(llama(), use_dora=True))
        assert {r.algorithm for n, r in dora.items() if "magnitude" in n} == {"adamw"}

    def test_modules_to_save_follow_the_original(self):
        model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL, **ROPE, num_labels=3))
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type=TaskType.SEQ_CLS)
        found = routed(get_peft_model(model, config))
        assert {r.kind for n, r in found.items() if "modules_to_save" in n} == {"head"}

    def test_experts_adapted_by_peft_stay_apart(self):
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, **ROPE, num_local_experts=4))
        config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
        found = routed(get_peft_model(model, config))
        a = next(r for n, r in found.items() if "experts" in n and "lora_A" in n)
        b = next(r for n, r in found.items() if "experts" in n and "lora_B" in n)
        assert a.layout.total() == b.layout.total() == 4
        by_hand = b.parameter.reshape(b.parameter.shape[0], -1, 4)
        for i, piece in enumerate(b.layout.pieces(b.parameter)):
            assert torch.equal(b.layout.to_matrices(piece, i)[0], by_hand[:, :, i])


class TestOptions:
    def test_split_fused_off_keeps_experts_apart(self):
        found = causal(hf.MixtralConfig(**SMALL, **ROPE, num_local_experts=4), split_fused=False)
        assert found["model.layers.0.mlp.experts.gate_up_proj"].layout == MatrixLayout((4, 96, 32), batch=1)
        phi = causal(hf.Phi3Config(**SMALL, **ROPE, pad_token_id=0), split_fused=False)
        assert pieces(phi, "qkv_proj.weight") == (1, (), 0, False)

    def test_per_head(self):
        found = routed(llama(), per_head=True)
        layer = "model.layers.0.self_attn."
        assert found[layer + "q_proj.weight"].layout.matrices() == ((4, 8, 32),)
        assert found[layer + "k_proj.weight"].layout.matrices() == ((2, 8, 32),)
        assert found[layer + "o_proj.weight"].layout.matrices() == ((4, 32, 8),)
        assert found["model.layers.0.mlp.up_proj.weight"].layout.total() == 1
        fused = causal(hf.Phi3Config(**SMALL, **ROPE, pad_token_id=0), per_head=True)
        assert fused[layer + "qkv_proj.weight"].layout.matrices() == ((4, 8, 32), (2, 8, 32), (2, 8, 32))
        gpt2 = causal(hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64), per_head=True)
        assert gpt2["transformer.h.0.attn.c_attn.weight"].layout.matrices() == ((4, 8, 32),) * 3
        assert gpt2["transformer.h.0.attn.c_proj.weight"].layout.matrices() == ((4, 32, 8),)

    def test_per_head_without_known_heads_is_an_error(self):
        class OddAttention(nn.Module):
            def __init__(self):
                super().__init__()
                self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        with pytest.raises(ValueError, match=r"q_proj\.weight.*heads.*exclude"):
            route(OddAttention(), MuonConfig(per_head=True))

    def test_include_and_exclude(self):
        found = routed(llama(), exclude=("*.up_proj.weight",), include=("lm_head*",))
        assert {r.kind for n, r in found.items() if "up_proj" in n} == {"excluded"}
        assert found["lm_head.weight"].algorithm == "muon"

    def test_include_keeps_a_known_layout(self):
        found = causal(hf.Phi3Config(**SMALL, **ROPE, pad_token_id=0), include=("*qkv_proj*",))
        assert pieces(found, "qkv_proj.weight") == (1, (32, 16, 16), 0, False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(include=("*nothing*",)), "matches no trainable parameter"),
            (dict(exclude=("*nothing*",)), "matches no trainable parameter"),
            (dict(include=("*q_proj*",), exclude=("model.*",)), "by include and by exclude"),
            (dict(include=("*norm*",)), "no matrix"),
        ],
    )
    def test_bad_patterns(self, options, message):
        with pytest.raises(ValueError, match=message):
            route(llama(), MuonConfig(**options))


class TestGroups:
    def test_two_groups_that_partition_the_model(self):
        model = llama()
        muon, adamw = param_groups(model, lr=1e-3, weight_decay=0.1)
        names = [n for g in (muon, adamw) for n, _ in g["params"]]
        assert sorted(names) == sorted(n for n, _ in model.named_parameters())
        assert (muon["algorithm"], adamw["algorithm"]) == ("muon", "adamw")
        assert len(muon["params"]) == len(muon["kinds"]) == len(muon["matrices"])
        assert muon["hidden_size"] == 32
        assert {g["weight_decay"] for g in (muon, adamw)} == {0.1}
        assert all(
            MatrixLayout.of(k).shape == tuple(p.shape)
            for k, (_, p) in zip(muon["matrices"], muon["params"], strict=True)
        )

    def test_learning_rates_and_the_trainers_decay_rule(self):
        groups = param_groups(
            llama(), lr=1e-3, weight_decay=0.1, muon_lr=2e-3, adamw_lr=3e-3, decay_norms_and_biases=False
        )
        assert [g["lr"] for g in groups] == [2e-3, 3e-3, 3e-3]
        assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
        assert set(groups[2]["kinds"]) == {"norm"}

    def test_no_group_is_empty_and_no_tag_is_left_on_parameters(self):
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        assert len(param_groups(model, lr=1e-3)) == 1
        assert not any(hasattr(p, "use_muon") for p in model.parameters())  # DeepSpeed would act on it

    def test_tied_weights_appear_once(self):
        model = llama(tie_word_embeddings=True)
        found = routed(model)
        assert found["model.embed_tokens.weight"].tied == ("lm_head.weight",)
        assert "lm_head.weight" not in found

    def test_shapes_under_zero_init_come_from_deepspeed(self):
        model = llama()
        expected = [r.layout for r in route(model)]
        for p in model.parameters():
            p.ds_shape = p.shape
            p.data = torch.empty(0)
        assert [r.layout for r in route(model)] == expected


class TestPlainModules:
    def test_head_of_a_model_that_is_not_huggingfaces(self):
        model = nn.Sequential(nn.Embedding(96, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 96))
        assert [r.kind for r in route(model) if r.name.endswith("weight")] == ["embedding", *["projection"] * 2, "head"]

    def test_torch_attention_lstm_and_convolutions(self):
        attention = routed(nn.MultiheadAttention(32, 4))
        assert pieces(attention, "in_proj_weight") == (1, (32, 32, 32), 0, False)
        assert pieces(routed(nn.LSTM(8, 16)), "weight_ih_l0") == (1, (16,) * 4, 0, False)
        assert pieces(routed(nn.GRU(8, 16)), "weight_hh_l0") == (1, (16,) * 3, 0, False)
        conv = routed(
            nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.Conv2d(16, 16, 3, groups=16), nn.ConvTranspose1d(16, 8, 2))
        )
        assert conv["0.weight"].layout.matrices() == ((2, 8, 36),)
        assert conv["1.weight"].algorithm == "adamw"
        assert conv["2.weight"].layout.matrices() == ((1, 16, 16),)

    def test_weight_norm_is_adamws(self):
        model = nn.Sequential(nn.Linear(8, 8), torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
        assert {r.algorithm for n, r in routed(model).items() if "parametrizations" in n} == {"adamw"}

    def test_a_gated_unit_is_found_without_its_name(self):
        class Feed(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(8, 48), nn.Linear(24, 8)

        assert pieces(routed(Feed()), "first.weight") == (1, (24, 24), 0, False)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_pack, self.out = nn.Linear(8, 24), nn.Linear(8, 8)


class Splitting(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.out = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x):
        a, b = self.wide(x).chunk(2, dim=-1)
        return self.out(a * b)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.blocks = nn.Parameter(torch.zeros(3, 8, 8))


class TestErrors:
    @pytest.mark.parametrize("module", [Packed, Splitting, Stack])
    def test_unknown_layouts_name_the_parameter_and_the_remedy(self, module):
        with pytest.raises(ValueError, match=r"\[(24|16|3), 8.*include.*exclude"):
            route(module())
        name = {"Packed": "W_pack.weight", "Splitting": "wide.weight", "Stack": "blocks"}[module.__name__]
        assert routed(module(), include=(name,))[name].algorithm == "muon"
        assert routed(module(), exclude=(name,))[name].algorithm == "adamw"

    def test_frozen_model(self):
        with pytest.raises(ValueError, match="no trainable parameter"):
            route(llama().requires_grad_(False))

    def test_no_hidden_matrix(self):
        with pytest.raises(ValueError, match="none of the 1 trainable"):
            route(nn.Embedding(8, 8))

    def test_complex_parameter(self):
        with pytest.raises(ValueError, match=r"complex64.*freeze"):
            route(nn.Linear(4, 4, dtype=torch.complex64))

    def test_wrapped_tensor(self):
        class Quantized(torch.Tensor):
            pass

        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Quantized))
        with pytest.raises(ValueError, match="Quantized"):
            route(model)

    def test_frozen_quantized_weights_are_no_business_of_ours(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        assert "1.weight" in routed(model)


def test_explain_prints_what_it_returns(capsys):
    report = explain(llama())
    printed = capsys.readouterr().out
    assert printed.strip() == str(report).strip()
    assert report.summary() in printed
    assert sum(r.numel for r in report.rows) == report.numel() == sum(p.numel() for p in llama().parameters())
    assert math.isclose(report.numel("muon") + report.numel("adamw"), report.numel())
    assert {r.matrices for r in report.rows if r.kind == "mlp"} == {6}


def test_groups_carry_what_was_asked_and_nothing_else():
    model = tiny.qwen2()
    muon, adamw = Muon(param_groups(model), lr=5e-3, weight_decay=0.2, momentum=0.6).param_groups
    assert (muon["lr"], adamw["lr"], muon["weight_decay"], muon["momentum"]) == (5e-3, 5e-3, 0.2, 0.6)
    by_config = Muon(param_groups(model, MuonConfig(momentum=0.5, ns_steps=7, ns_dtype="float32"))).param_groups[0]
    assert (by_config["momentum"], by_config["ns_steps"], by_config["ns_dtype"]) == (0.5, 7, "float32")
    by_keyword = Muon(param_groups(model, momentum=0.5), momentum=0.9, ns_steps=4).param_groups[0]
    assert (by_keyword["momentum"], by_keyword["ns_steps"]) == (0.5, 4)


def test_an_excluded_norm_keeps_its_own_decay_rule():
    groups = param_groups(tiny.qwen2(), exclude=("*norm*",), decay_norms_and_biases=False, weight_decay=0.1)
    assert {g["weight_decay"] for g in groups for k in g["kinds"] if k in ("norm", "bias")} == {0.0}


def test_a_class_name_does_not_make_a_linear_a_norm():
    class NormHeadLinear(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(NormHeadLinear(8, 8), torch.nn.Linear(8, 8))
    assert {r.algorithm for r in route(model) if r.parameter.ndim == 2} == {"muon"}


def test_a_bare_layer_and_its_report():
    model = torch.nn.Linear(8, 16)
    report = explain(model)
    assert repr(report).startswith("<Report: 144 trainable parameters") and len(repr(report)) < 200
    assert [g["algorithm"] for g in param_groups(model)] == ["muon", "adamw"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: explain(m, "exclude=*q_proj*"), TypeError, "from_optim_args"),
        (lambda m: param_groups(m, momentun=0.9), ValueError, "valid: momentum"),
        (lambda m: param_groups(list(m.parameters())), TypeError, "got a list"),
        (lambda m: param_groups(m, exclude="q_proj"), ValueError, "shell globs"),
        (lambda m: param_groups(m, include="*norm*"), ValueError, "drop it from include"),
    ],
)
def test_mistakes_in_the_python_api_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call(tiny.qwen2())
