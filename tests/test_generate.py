"""Inference: what the model is given, where it stops, and what is printed."""

import generate
import pytest
import torch
from transformers import GenerationConfig

from . import tiny

ANSWER = "yes"


def parse(*arguments):
    return generate.make_parser().parse_args(["m", *arguments])


def says(model, text):
    """The model, made to say a text whatever it is given."""
    tokens, forward = iter(tiny.tokenizer()(text)["input_ids"]), model.forward

    def scripted(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[:, -1] = -100.0
        out.logits[:, -1, next(tokens)] = 100.0
        return out

    model.forward = scripted
    return model


def test_chat_is_rendered_up_to_the_answer_and_a_prompt_is_left_as_it_is():
    tokenizer = tiny.tokenizer()
    chat = generate.encode(tokenizer, parse("--chat", "hi", "--system", "be kind"))[0]
    assert tokenizer.decode(chat) == (
        "<|im_start|>system\nbe kind<|im_end|><|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    )
    assert tokenizer.decode(generate.encode(tokenizer, parse("--prompt", "1+1="))[0]) == "1+1="


def test_a_template_of_the_run_replaces_the_tokenizers_and_none_is_an_error(tmp_path):
    tokenizer = tiny.tokenizer()
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    tokens = generate.encode(tokenizer, parse("--chat", "hi", "--chat_template", str(tmp_path / "t.jinja")))[0]
    assert tokenizer.decode(tokens) == "[hi]"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        generate.encode(tokenizer, parse("--chat", "hi"))
    with pytest.raises(ValueError, match="belong to --chat"):
        generate.encode(tokenizer, parse("--prompt", "x", "--system", "y"))


def test_a_chat_stops_at_the_end_of_a_turn_though_the_checkpoint_names_only_its_end_of_text():
    tokenizer, model = tiny.tokenizer(), tiny.qwen2(eos_token_id=None)
    end_of_text, end_of_turn = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.pad_token
    model.generation_config = GenerationConfig(eos_token_id=end_of_text)
    assert generate.stops(model, tokenizer, chat=True) == sorted([end_of_text, end_of_turn])
    assert generate.stops(model, tokenizer, chat=False) == [end_of_text]
    says(model, f"{ANSWER}<|im_end|>\n<|im_start|>user and more of it")
    assert generate.generate(model, tokenizer, parse("--chat", "hi", "--max_new_tokens", "20")) == ANSWER


def test_generation_has_at_most_so_many_tokens():
    model = says(tiny.qwen2(), "abcdefgh")
    assert generate.generate(model, tiny.tokenizer(), parse("--prompt", "x", "--max_new_tokens", "4")) == "abcd"


def test_greedy_is_the_argmax_of_every_step():
    model, tokenizer = tiny.qwen2().eval(), tiny.tokenizer()
    tokens = tokenizer("hello", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokens[0, 5:].tolist()
    ends = generate.stops(model, tokenizer, chat=False)
    expected = expected[: next((i for i, token in enumerate(expected) if token in ends), 8)]
    got = generate.generate(model, tokenizer, parse("--prompt", "hello", "--max_new_tokens", "8"))
    assert got == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_saved_checkpoint_is_read_and_sampling_repeats_with_its_seed(tmp_path, capsys):
    tiny.qwen2().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    said = []
    for seed in ("3", "2", "2", "3"):  # what the first load says of the machine is not compared
        arguments = ["--chat", "hi", "--temperature", "1.0", "--seed", seed, "--max_new_tokens", "12"]
        generate.main([str(tmp_path), *arguments, "--device_map", "cpu"])
        said.append(capsys.readouterr().out)
    assert said[1] == said[2] != said[3]


def test_adapters_are_read_with_their_base_model(tmp_path):
    peft = pytest.importorskip("peft")
    tiny.qwen2().save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        tiny.qwen2().from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    loaded, _ = generate.load(parse_model(tmp_path / "adapter"))
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, model.eval()(tokens).logits, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-3)


def parse_model(folder):
    return generate.make_parser().parse_args([str(folder), "--prompt", "x", "--device_map", "cpu"])
