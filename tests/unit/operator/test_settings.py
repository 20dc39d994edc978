"""Arguments over environment over defaults, and what is refused."""

import pytest

from finetune_operator.settings import Settings


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_TRAINER_IMAGE", "from-environment")
    monkeypatch.setenv("FINETUNE_PROGRESS_PORT", "9000")
    monkeypatch.setenv("FINETUNE_WATCH_NAMESPACES", "a, b")
    settings = Settings.parse(["--trainer-image", "from-argument"])
    assert settings.trainer_image == "from-argument"
    assert settings.progress_port == 9000
    assert settings.namespaces == ["a", "b"]
    assert settings.identity


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--trainer-image"),
        (["--trainer-image=x", "--lease-seconds=3"], "--renew-deadline"),
        (["--trainer-image=x", "--retry-period=9"], "--retry-period"),
        (["--trainer-image=x", "--workers=many"], "--workers"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.parse(arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]
