"""Variables that weaken vLLM do not reach a server by inheritance."""

from gserve_core.environment import weakening


def test_what_weakens_vllm_is_overridden_unless_the_config_has_chosen_it() -> None:
    inherited = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONOPTIMIZE": "2", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "A": "b"}
    assert weakening(inherited, {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}) == {
        "VLLM_SERVER_DEV_MODE": "0",
        "PYTHONOPTIMIZE": "",
    }


def test_an_environment_without_them_stays_as_it_is() -> None:
    assert weakening({"PATH": "/bin", "VLLM_SERVER_DEV_MODE": "0", "PYTHONOPTIMIZE": ""}, ()) == {}
