"""The tokenizer without transformers: the same ids, chats and texts as transformers'."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from secateur.errors import ModelError
from secateur.serve import chat_template
from secateur.serve.text import TextCodec
from secateur.serve.tokenizer import JsonTokenizer

from .conftest import CHAT_TEMPLATE, TEXT, make_tokenizer

MESSAGES = [
    {"role": "system", "content": "be <brief> & 'kind'\n"},
    {"role": "user", "content": "  jump 😀\n\nover "},
    {"role": "assistant", "content": "<|im_end|> no"},
    {"role": "user", "content": "why?"},
]


def sentencepiece_like(prepend: str = "never", *, bos: bool = False) -> Tokenizer:
    """Pieces with ▁ for a space, bytes where no piece fits."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    raw.train_from_iterator([TEXT], trainer)
    state = json.loads(raw.to_str())  # the byte pieces are pieces, no added tokens
    state["added_tokens"] = state["added_tokens"][:3]
    raw = Tokenizer.from_str(json.dumps(state))
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return raw


def with_gaps_and_normalizers() -> Tokenizer:
    """Byte-level, lower case, NFKC; ids 300 to 399 belong to nobody."""
    raw: Tokenizer = make_tokenizer().backend_tokenizer
    state = json.loads(raw.to_str())
    vocabulary = state["model"]["vocab"]
    highest = max(vocabulary.values())
    for piece, token in vocabulary.items():
        if token > highest - 5:
            vocabulary[piece] = token + 400 - highest
    raw = Tokenizer.from_str(json.dumps(state))
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    raw.enable_truncation(4)
    raw.enable_padding(length=8, pad_token="<|endoftext|>")
    return raw


def save(
    directory: Path, raw: Tokenizer, config: dict[str, Any], **files: dict[str, Any] | str
) -> Path:
    raw.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("_dot_", ".")).write_text(text)
    return directory


SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
MADE: dict[str, Callable[[Path], Path]] = {
    "byte-level": lambda at: save(at, make_tokenizer().backend_tokenizer, FAST),
    "gaps, normalizers, truncation": lambda at: save(
        at, with_gaps_and_normalizers(), FAST | {"eos_token": "<|im_end|>"}
    ),
    "sentencepiece": lambda at: save(at, sentencepiece_like(), FAST | SPECIALS),
    "sentencepiece, BOS": lambda at: save(
        at, sentencepiece_like("first", bos=True), FAST | SPECIALS | {"add_bos_token": False}
    ),
    "special tokens of old models": lambda at: save(
        at,
        sentencepiece_like(),
        FAST,
        special_tokens_map_dot_json={
            "bos_token": {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False},
            "eos_token": "</s>",
        },
    ),
    "tokens that only the settings know": lambda at: save(
        at,
        make_tokenizer().backend_tokenizer,
        FAST
        | {
            "eos_token": {"__type": "AddedToken", "content": "<|end|>"},
            "image_token": "<image>",
            "extra_special_tokens": ["<a>", "<b>"],
            "added_tokens_decoder": {
                "320": {"content": "[x]", "special": False, "lstrip": True, "rstrip": True},
            },
        },
    ),
}
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "everything": """
{%- set ns = namespace(system='', n=0) %}
{%- for m in messages if m.role == 'system' %}
    {%- set ns.system = m.content | trim %}
{%- endfor %}
{{- bos_token if bos_token is defined else 'none' }}{{ eos_token }}
{% if tools %}tools{% endif %}{% if documents is none %}-{% endif %}
  {# a comment #}
{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% set ns.n = ns.n + 1 %}
[{{ m | tojson }}|{{ {'b': 1, 'a': 'é<'} | tojson(indent=2, sort_keys=true) }}]
    {% if m.role == 'assistant' %}{% generation %}{{ m['content'].upper() }}{% set ns.n = 7 %}
    {% endgeneration %}{% endif %}
{% endfor %}
{{ ns.n }}{{ ns.system }}{{ dict(a=1) }}{{ strftime_now('%Y') }}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
""",
}


@pytest.fixture(scope="module", params=MADE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    path = MADE[request.param](tmp_path_factory.mktemp("tokenizer"))
    return JsonTokenizer(path), AutoTokenizer.from_pretrained(path)


def compare(ours: JsonTokenizer, theirs: Any, text: str) -> None:
    for special in (True, False):
        ids = theirs.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special_tokens=special) == ids
    codec = TextCodec(ours)
    assert codec.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


pieces = st.sampled_from(["<s>", "</s>", "<|im_end|>", "[x]", " [x] ", "<a>", "<image>", "<unk>"])
texts = st.lists(st.text(alphabet=st.characters(exclude_categories=("Cs",))) | pieces).map("".join)


@given(texts)
@settings(max_examples=60)
def test_ids_and_text(pair: Any, text: str) -> None:
    compare(*pair, text)


def test_special_tokens(pair: Any) -> None:
    ours, theirs = pair
    assert ours.eos_token_id == theirs.eos_token_id
    assert TextCodec(ours).special == TextCodec(theirs).special
    codecs = TextCodec(ours), TextCodec(theirs)
    for token in range(len(theirs) + 200):
        assert codecs[0].token_bytes(token) == codecs[1].token_bytes(token)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("form", ["file", "text", "list", "file before text"])
def test_chats(template: str, form: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = FAST | SPECIALS | {"image_token": "<image>"}
    files = {}
    if form.startswith("file"):
        files["chat_template_dot_jinja"] = template
        config["chat_template"] = "another"
    elif form == "text":
        config["chat_template"] = template
    else:
        config["chat_template"] = [
            {"name": "tool_use", "template": "another"},
            {"name": "default", "template": template},
        ]
    save(tmp_path, sentencepiece_like(bos=True), config, **files)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = TextCodec(JsonTokenizer(tmp_path))
    for count in range(1, len(MESSAGES) + 1):
        expected = theirs.apply_chat_template(
            MESSAGES[:count], tokenize=False, add_generation_prompt=True
        )
        assert ours.render_chat(MESSAGES[:count]) == expected
        assert ours.encode(expected, special=False) == theirs.encode(
            expected, add_special_tokens=False
        )


def test_the_real_model(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = JsonTokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    source = Path(__file__).read_text(encoding="utf-8")
    for text in (TEXT, source, "naïve 😀 你好\t\r\n  ½" * 40):
        compare(ours, theirs, text)
    rendered = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert TextCodec(ours).render_chat(MESSAGES) == rendered


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "longer",
        ),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "writes more"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set n = namespace(_x=1) %}", "not allowed"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "not allowed"),
    ],
)
def test_templates_that_misbehave(source: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import jinja2

    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    monkeypatch.setattr(chat_template, "CHARACTERS", 2**20)
    template = chat_template.ChatTemplate(source, {})
    trace = sys.gettrace()
    with pytest.raises(jinja2.TemplateError, match=says):
        template.render(MESSAGES)
    assert sys.gettrace() is trace


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", "no tokenizer"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", "[]", "no JSON object"),
        ("chat_template.jinja", "{% if %}", "damaged"),
    ],
)
def test_damaged_files(name: str, content: str | None, says: str, tmp_path: Path) -> None:
    save(tmp_path, sentencepiece_like(), FAST)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=says):
        JsonTokenizer(tmp_path)


def test_neither_torch_nor_transformers(tmp_path: Path) -> None:
    save(tmp_path, sentencepiece_like(), FAST, chat_template_dot_jinja=CHAT_TEMPLATE)
    code = (
        "import sys; from secateur.serve.tokenizer import JsonTokenizer\n"
        f"JsonTokenizer({str(tmp_path)!r})\n"
        "print({'torch', 'transformers', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_added_tokens_keep_their_flags(tmp_path: Path) -> None:
    raw = sentencepiece_like()
    raw.add_tokens([AddedToken("[y]", lstrip=True)])
    save(tmp_path, raw, FAST)
    tokenizer = JsonTokenizer(tmp_path)
    token = tokenizer.backend_tokenizer.token_to_id("[y]")
    assert tokenizer.encode("the   [y]")[-1] == token
    assert not tokenizer.added_tokens_decoder[token].special
