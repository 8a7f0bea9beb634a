"""Templates, articles, caption files and the trigger token."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from subjectbooth.tests.comfy_server import find_comfyui
from subjectbooth.tests.conftest import ROOT
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.subject.captions import article, caption_file_of, check_template, fill_template, read_caption
from subjectbooth.trainer.subject.trigger import (
    _WORDS,
    DEFAULT_TOKEN,
    GOOD_TOKENS,
    RARE_FROM,
    check_token,
    check_word,
)

RUSSIAN = "Фотография собаки породы корги на зелёном лугу"
FRENCH = "une photo d'un café à côté de la forêt, été"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dog", "a"),
        ("owl", "an"),
        ("unicorn", "a"),
        ("umbrella", "an"),
        ("uninteresting toy", "an"),
        ("hourglass", "an"),
        ("house", "a"),
        ("European bison", "a"),
        ("elephant", "an"),
        ("one-wheel toy", "a"),
        ("ukulele", "a"),
        ("Apple", "an"),
        ("USB stick", "a"),
        ("urn", "an"),
        ("собака", "a"),
        ("user", "a"),
    ],
)
def test_article(word: str, expected: str) -> None:
    assert article(word) == expected


def test_fill() -> None:
    assert fill_template("a photo of {token} {class}", "ohwx", "dog") == "a photo of ohwx dog"
    assert fill_template("a photo of {subject}", "ohwx", "dog") == "a photo of ohwx dog"
    assert fill_template("a photo of a {class}", "ohwx", "owl") == "a photo of an owl"
    assert fill_template("An {class}, and the {class}", "ohwx", "dog") == "A dog, and the dog"
    # A filled-in word is text, not a template, and foreign braces are left alone.
    assert fill_template("{token} {0.__class__} {x|y}", "{class}", "dog") == "{class} {0.__class__} {x|y}"


@pytest.mark.parametrize(
    ("template", "needs_token", "says"),
    [
        ("", True, "prompt_template is empty"),
        ("a photo of a {class}", True, "does not contain the token"),
        ("a photo of {tokn} {class}", True, "has the placeholder {tokn}"),
        ("a photo of {token.__class__}", True, "has the placeholder {token.__class__}"),
        ("a photo of {token} {class", True, "unpaired brace"),
        ("a photo of {subject}", False, "contains the token"),
    ],
)
def test_templates_that_cannot_be_used(template: str, needs_token: bool, says: str) -> None:
    with pytest.raises(SubjectBoothError) as caught:
        check_template(template, needs_token=needs_token)
    assert says in str(caught.value)


def test_template_is_tidied() -> None:
    assert check_template("  a photo\n of {token}  {class} ", needs_token=True) == "a photo of {token} {class}"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (RUSSIAN, "utf-8"),
        (RUSSIAN, "utf-8-sig"),
        (RUSSIAN, "utf-16"),
        (RUSSIAN, "utf-16-le"),
        (RUSSIAN, "utf-16-be"),
        (RUSSIAN, "utf-32"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (RUSSIAN, "cp866"),
        (FRENCH, "utf-8"),
        (FRENCH, "cp1252"),
        (FRENCH, "latin-1"),
        ("eine Möwe über Köln – schön", "cp1252"),
        ("ФОТО OHWX СОБАКА", "cp1251"),  # in KOI8-R these bytes are small letters: "тнрн"
        ("фото ohwx собака", "cp1251"),
        ("Фото OHWX: собака «Рекс» – на траве", "cp1251"),
        ("фото ohwx собака", "koi8-r"),
        ("ФОТО СОБАКИ НА ТРАВЕ", "koi8-r"),
        ("Фото собаки на траве", "mac-cyrillic"),
        ("ohwx dog • garden ½", "cp1252"),
        ("“ohwx” dog’s café … £5", "cp1252"),
        ("una foto de ohwx en el jardín, niño", "cp1252"),
        ("a photo of ohwx dog\r\n", "utf-8-sig"),
        ("a photo of ohwx dog", "ascii"),
        ("a photo of ohwx dog", "utf-16-le"),
        ("一张狗的照片 🐶", "utf-8"),
    ],
)
def test_caption_encodings(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "dog.txt").write_bytes(f"  {text}\r\n".encode(encoding))
    assert read_caption(tmp_path / "dog.txt") == text.strip()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("一张狗在草地上奔跑的照片".encode("gbk"), "cannot be detected"),
        ("犬の写真です".encode("shift-jis"), "cannot be detected"),
        ("zdjęcie psa ohwx".encode("cp1250"), "cannot be detected"),
        ("ohwx kočka".encode("cp1250"), "cannot be detected"),
        ("ohwx köpek fotoğrafı".encode("cp1254"), "cannot be detected"),
        ("ohwx šuo, gėlė".encode("cp1257"), "cannot be detected"),
        ("à ohwx".encode("cp1252"), "cannot be detected"),  # in Windows-1251 a Russian "а"
        ("ohwx и".encode("cp1251"), "cannot be detected"),
        (bytes(range(256)), "cannot be detected"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" * 9, "cannot be detected"),
        (b"", "is empty"),
        (b" \n\t\r\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"dog " * 20_000, "is 78 KB long"),
    ],
)
def test_captions_that_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "dog.txt").write_bytes(content)
    with pytest.raises(SubjectBoothError) as caught:
        read_caption(tmp_path / "dog.txt")
    assert says in str(caught.value) and "dog.txt" in str(caught.value)


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "cp866", "mac-cyrillic", "iso8859-5"])
def test_russian_is_read_right_or_not_at_all(tmp_path: Path, encoding: str) -> None:
    """Short captions too, of which two code pages may make words: "ОБЪЕКТ" in one is "назейр" in another."""
    texts = [
        "объект",
        "объект на столе",
        "важнее любой",
        "время",
        "перед первым",
        "собака",
        "старый кот на диване",
        "женщина в шляпе",
        "игрушка",
        "моя кошка",
        "рюкзак у стены",
        "ваза",
        "машина ночью",
        "портрет мужчины",
    ]
    path, right, count = tmp_path / "dog.txt", 0, 0
    for text in texts:
        for caption in (text, text.upper(), text.capitalize(), f"ohwx {text}", f"OHWX {text.upper()}"):
            path.write_bytes(caption.encode(encoding))
            count += 1
            try:
                assert read_caption(path) == caption
                right += 1
            except SubjectBoothError:
                pass
    assert right >= 0.5 * count


def test_a_missing_caption_file_is_named(tmp_path: Path) -> None:
    assert caption_file_of(tmp_path / "my dog.final.jpg").name == "my dog.final.txt"
    with pytest.raises(SubjectBoothError, match="Caption file dog.txt not found"):
        read_caption(tmp_path / "dog.txt")


@functools.lru_cache(maxsize=1)
def clip_vocabulary() -> dict[str, int]:
    comfyui = find_comfyui(ROOT)
    if comfyui is None:
        pytest.skip("no ComfyUI here, whose tokenizer this reads")
    return json.loads((comfyui / "comfy" / "sd1_tokenizer" / "vocab.json").read_text("utf-8"))


@functools.lru_cache(maxsize=1)
def clip_tokenize() -> Callable[[str], list[int]]:
    from transformers import CLIPTokenizer

    clip_vocabulary()
    tokenizer = CLIPTokenizer.from_pretrained(str(find_comfyui(ROOT) / "comfy" / "sd1_tokenizer"))
    return lambda text: tokenizer(text)["input_ids"][1:-1]


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("sks", "already means a rifle"),
        ("SKS", "already means a rifle"),
        ("dvr", "already means a video recorder"),
        ("dog", "CLIP already knows (number 1,929"),
        ("red", "CLIP already knows (number 736"),
        ("corgi", "CLIP already knows"),
        ("teapot", "CLIP already knows (number 40,749"),
        ("fawn", "CLIP already knows"),
        ("zwx", "is split into 2 CLIP tokens"),
        ("[V]", "is split into 3 CLIP tokens"),
        ("<new1>", "is split into 4 CLIP tokens"),
        ("ohwx toy", "is split into 2 CLIP tokens"),
    ],
)
def test_tokens_that_are_warned_about(token: str, says: str) -> None:
    (warning,) = check_token(token, "vase", clip_tokenize())
    assert says in warning and '"ohwx"' in warning and warning.endswith(".")


@pytest.mark.parametrize("token", ["ohwx", "hta", "olis", "shs", "OHWX", "phol"])
def test_tokens_that_are_fine(token: str) -> None:
    assert check_token(token, "dog", clip_tokenize()) == []


def test_the_good_tokens_are_single_in_clips_vocabulary() -> None:
    ids = [clip_tokenize()(token) for token in GOOD_TOKENS]
    assert ids == [[47993], [49384], [49397], [16184]] and GOOD_TOKENS[0] == DEFAULT_TOKEN


def test_the_list_of_words_holds_only_words_the_rule_would_miss() -> None:
    vocabulary = clip_vocabulary()
    assert [w for w in _WORDS if len(w) > 4 or vocabulary.get(f"{w}</w>", 0) < RARE_FROM] == []


def test_token_in_the_class_word() -> None:
    (warning,) = check_token("ohwx", "ohwx dog", None)
    assert "part of the class word" in warning and '"hta"' in warning


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("(dog:1.3)", "'('"),
        ("embedding:x", "':'"),
        ("{class}", "'{'"),
        ("a\\b", "'\\\\'"),
        ("dog\x07", "'\\x07'"),
        ("d" * 61, "61 characters"),
    ],
)
def test_words_that_cannot_be_used(value: str, says: str) -> None:
    with pytest.raises(SubjectBoothError) as caught:
        check_word(value, "class_word", "dog")
    assert str(caught.value).startswith("class_word") and says in str(caught.value)


@pytest.mark.parametrize(
    ("given", "learned"),
    [
        ("an old man", "old man"),
        ("a dog", "dog"),
        ("The  cat", "cat"),
        ("A", "A"),
        ("another dog", "another dog"),
        ("a-frame house", "a-frame house"),
        ("theatre", "theatre"),
    ],
)
def test_a_class_word_brings_no_article(given: str, learned: str) -> None:
    assert check_word(given, "class_word", "dog") == learned
    assert check_word(given, "token", "ohwx") == " ".join(given.split()), "a token is what it is"


def test_words_are_tidied() -> None:
    assert check_word("  toy \t dog ", "class_word", "dog") == "toy dog"
    assert check_word("собака", "class_word", "dog") == "собака"
