import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ModelError, RequestError
from engine.frontend.tokenizer import Tokenizer, load_tokenizer
from tests.engine.frontend.conftest import CITED, END, byte_level_library


def test_a_folder_gives_tokenizer_ends_and_template(model_folder: Path):
    tokenizer, warnings = load_tokenizer(model_folder)
    assert not warnings
    end = tokenizer.backend.id_of(END)
    assert tokenizer.eos_ids == (end, 7)
    assert tokenizer.special_ids == {end}
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"


def test_generation_config_overrules_config_and_may_list_several(model_folder: Path):
    (model_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    tokenizer, _ = load_tokenizer(model_folder)
    assert tokenizer.eos_ids[1:] == (3, 4)


def test_eos_ids_of_other_types_are_converted_or_named(model_folder: Path):
    (model_folder / "generation_config.json").write_text("\ufeff" + json.dumps({"eos_token_id": [3.0, 4]}))
    assert load_tokenizer(model_folder)[0].eos_ids[1:] == (3, 4)
    for wrong in ("4", [True], {"id": 4}, 2.5):
        (model_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ModelError, match="eos_token_id must be an integer or a list of integers, not"):
            load_tokenizer(model_folder)


def test_a_conversation_is_written_by_the_template(model_folder: Path):
    tokenizer, _ = load_tokenizer(model_folder)
    conversation = [{"role": "user", "content": "the fox"}]
    assert tokenizer.render_chat(conversation) == f"[user] the fox{END}\n[assistant] "
    assert tokenizer.render_chat(conversation, add_generation_prompt=False) == f"[user] the fox{END}\n"
    ids = tokenizer.encode(tokenizer.render_chat(conversation), False)
    assert ids.count(tokenizer.backend.id_of(END)) == 1, "a special token in the template is one token"


def test_a_template_of_its_own_file_wins(model_folder: Path):
    (model_folder / "chat_template.jinja").write_text("{{ messages | length }} messages")
    tokenizer, _ = load_tokenizer(model_folder)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "1 messages"


def test_special_tokens_come_from_every_place_that_folders_keep_them_in(model_folder: Path):
    (model_folder / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ image_token }}")
    settings = {"bos_token": "<a>", "eos_token": "the", "extra_special_tokens": {"image_token": "<image>"}}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (model_folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": END}})
    )
    tokenizer, _ = load_tokenizer(model_folder)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == f"<s>{END}<image>"
    assert tokenizer.eos_ids[0] == tokenizer.backend.id_of(END)


def test_templates_by_name_are_read_from_either_place(model_folder: Path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (model_folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    user = [{"role": "user", "content": "x"}]
    tokenizer, _ = load_tokenizer(model_folder)
    assert tokenizer.render_chat(user) == "D"
    assert tokenizer.render_chat(user, tools=[{"type": "function"}]) == "T"
    (model_folder / "additional_chat_templates").mkdir()
    (model_folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    tokenizer, _ = load_tokenizer(model_folder)
    assert [tokenizer.render_chat(user), tokenizer.render_chat(user, template="rag")] == ["D", "R"]


def test_what_a_template_refuses_is_the_request_s_fault(model_folder: Path):
    tokenizer, _ = load_tokenizer(model_folder)
    with pytest.raises(RequestError, match="no tools here") as caught:
        tokenizer.render_chat([{"role": "tool", "content": "x"}])
    assert caught.value.field == "messages"


def test_a_template_can_reach_nothing_of_the_program(model_folder: Path):
    (model_folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    tokenizer, _ = load_tokenizer(model_folder)
    with pytest.raises(RequestError):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_a_template_that_is_none_costs_the_chats_alone(model_folder: Path):
    (model_folder / "chat_template.jinja").write_text("{% for %}")
    tokenizer, warnings = load_tokenizer(model_folder)
    assert "chat template" in warnings[0]
    assert tokenizer.template is None
    assert tokenizer.encode("the")


def test_ends_outside_the_vocabulary_are_dropped(model_folder: Path):
    tokenizer, _ = load_tokenizer(model_folder, vocab_size=5)
    assert tokenizer.eos_ids == (0,)


def test_without_a_template_chat_is_refused(byte_level: Tokenizer):
    with pytest.raises(RequestError, match="/v1/completions"):
        byte_level.render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("wanted", [True, False])
def test_add_bos_token_of_the_settings_holds(model_folder: Path, wanted: bool):
    settings = {"bos_token": END, "add_bos_token": wanted}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, _ = load_tokenizer(model_folder)
    bos = tokenizer.backend.id_of(END)
    assert (tokenizer.encode("the")[0] == bos) == wanted
    assert tokenizer.encode("the", add_special_tokens=False)[0] != bos


def test_every_piece_is_what_the_library_decodes(byte_level: Tokenizer):
    for token in range(byte_level.vocab_size):
        assert byte_level.token_text(token) == byte_level.decode([token], skip_special_tokens=False)
    assert byte_level.token_text(byte_level.backend.id_of(CITED)) == CITED
    assert byte_level.piece(byte_level.vocab_size + 9) == b""


def test_weights_without_a_tokenizer_get_a_stand_in(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 500, "eos_token_id": 9}))
    for path in (tmp_path, tmp_path / "config.json"):
        tokenizer, warnings = load_tokenizer(path, 500)
        assert "no tokenizer" in warnings[0]
        assert tokenizer.encode("Aé") == [65, *"é".encode()]
        texts = [tokenizer.token_text(token) for token in range(500)]
        assert all(texts)
        assert len(set(texts)) == 500
        everything = list(range(500))
        assert tokenizer.encode(tokenizer.decode(everything)) == everything
        assert tokenizer.eos_ids == (9,)


def test_a_missing_tokenizer_is_one_line_with_the_flag(tmp_path: Path):
    with pytest.raises(ModelError, match="--tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(model_folder: Path, broken: str):
    (model_folder / broken).write_text("{")
    with pytest.raises(ModelError, match=broken):
        load_tokenizer(model_folder)


def test_other_tokenizer_files_go_through_transformers(tmp_path: Path):
    library = byte_level_library()
    library.model.save(str(tmp_path))  # vocab.json and merges.txt, as GPT-2 had them
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "the", "unk_token": "the", "bos_token": "the"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 340}))
    tokenizer, _ = load_tokenizer(tmp_path)
    assert tokenizer.concatenates
    assert tokenizer.decode(tokenizer.encode("quick fox")) == "quick fox"


def test_the_front_end_needs_neither_torch_nor_transformers():
    check = (
        "import sys, engine.api.app, engine.start, engine.llm\n"
        "sys.exit(', '.join(m for m in ('torch', 'transformers', 'pandas') if m in sys.modules) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_stand_in_keeps_the_ids_of_placeholders_apart_from_characters(tmp_path: Path) -> None:
    """Pixtral's placeholder has the id of a line break in ASCII."""
    config = {"model_type": "llava", "image_token_index": 10, "text_config": {"vocab_size": 300}}
    (tmp_path / "shape.json").write_text(json.dumps(config))
    tokenizer, _ = load_tokenizer(tmp_path / "shape.json", 300)
    assert tokenizer.encode("a\nb<10>") == [97, 32, 98, 10]
    assert tokenizer.token_text(10) == "<10>"
    assert tokenizer.template is not None
    written = tokenizer.render_chat([{"role": "user", "content": "hello"}])
    assert isinstance(written, str)
    assert 10 not in tokenizer.encode(written)


def test_a_stand_in_writes_the_contents_of_messages(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    tokenizer, _ = load_tokenizer(tmp_path, 300)
    assert tokenizer.render_chat([{"role": "user", "content": "hello"}]) == "hello\n"
    assert tokenizer.encode("\n") == [10]
