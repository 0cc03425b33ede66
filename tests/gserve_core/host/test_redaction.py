"""Secrets are known by name among arguments, and by value in texts."""

import pytest

from gserve_core.host.redaction import HIDDEN, SECRET, hidden, redact, secret_values

ARGUMENTS = {
    "hf_token": "hf_abcdefghij",
    "dtype": "bfloat16",
    "nested": {"Api_Key": ["sk-12345678", "sk-87654321"], "list": [{"password": "open sesame"}]},
    "HF_TOKEN": "short",
    "key": {"inside": "a secret below a secret"},
    "token": None,
    "secret": 12345678,
}


@pytest.mark.parametrize("name", ["hf_token", "HF_TOKEN", "OPENAI_API_KEY", "apikey", "key", "Secret", "DB_PASSWORD"])
def test_names_of_secrets_are_known_in_any_case(name: str) -> None:
    assert SECRET.search(name)


@pytest.mark.parametrize(
    "name", ["max_num_batched_tokens", "tokenizer", "monkey", "key_file", "TOKENIZERS_PARALLELISM"]
)
def test_other_names_are_no_secrets(name: str) -> None:
    assert not SECRET.search(name)


def test_values_are_found_at_any_depth_but_for_short_ones() -> None:
    expected = {"hf_abcdefghij", "sk-12345678", "sk-87654321", "open sesame", "a secret below a secret"}
    assert secret_values(ARGUMENTS) == expected
    assert secret_values({"SSH_KEY": "-----BEGIN-----\nabcdefgh\nxyz\n"}) == {"-----BEGIN-----", "abcdefgh"}


def test_a_text_is_freed_of_values_also_where_one_begins_another() -> None:
    values = {"12345678", "12345678-and-more"}
    assert redact("x 12345678-and-more, 12345678!", values) == f"x {HIDDEN}, {HIDDEN}!"
    assert redact("nothing", values) == "nothing"


def test_a_copy_hides_values_and_leaves_the_original_alone() -> None:
    before = repr(ARGUMENTS)
    assert hidden(ARGUMENTS) == {
        "hf_token": HIDDEN,
        "dtype": "bfloat16",
        "nested": {"Api_Key": HIDDEN, "list": [{"password": HIDDEN}]},
        "HF_TOKEN": HIDDEN,
        "key": HIDDEN,
        "token": None,
        "secret": HIDDEN,
    }
    assert repr(ARGUMENTS) == before
