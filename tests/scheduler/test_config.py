import pytest

from scheduler.config import Config, ConfigError, read_password
from scheduler.quotas import Quota
from scheduler.sources import load


def test_defaults_serve_the_demo_model_on_an_embedded_broker():
    config = load()
    assert config == Config()
    assert (config.broker.url, config.model.path) == ("embedded", "smollm2")


def test_flags_over_environment_over_file(tmp_path):
    file = tmp_path / "tokenbus.toml"
    file.write_text("[engine]\nmax_running = 3\nblock_size = 8\nkv_memory_mb = 64\n")
    environ = {"TOKENBUS_ENGINE_MAX_RUNNING": "4", "TOKENBUS_ENGINE_KV_MEMORY_MB": "128", "HOME": "/"}
    config = load(file, environ, {"engine.max_running": "5"})
    assert (config.engine.max_running, config.engine.kv_memory_mb, config.engine.block_size) == (5, 128, 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"engine.max_runing": "5"}, "unknown field `max_runing`"),
        ({"motor.size": "5"}, "unknown field `motor`"),
        ({"engine.max_running": "0"}, "max_running"),
        ({"engine.max_running": "many"}, "max_running"),
        ({"engine.max_running": "512"}, "max_batch_tokens"),
        ({"model.alias": "a/b"}, "model.alias: must be 1 to 64"),
        ({"model.dtype": "int3"}, "dtype"),
        ({"broker.url": "mqtt//host"}, "broker.url: the broker's URL must look like"),
        ({"broker.password": "hunter2"}, "unknown field `password`"),
        ({"broker.url": "mqtt://host", "broker.ca_file": "ca.crt"}, "broker.url: .* must begin with mqtts://"),
        ({"broker.cert_file": "a.crt"}, "broker.url: .* must begin with mqtts://"),
        ({"broker.url": "mqtts://host", "broker.key_file": "a.key"}, "needs its certificate file"),
    ],
)
def test_errors_name_the_setting(flags, message):
    with pytest.raises(ConfigError, match=message):
        load(flags=flags)


@pytest.mark.parametrize(
    "url",
    [
        "mqtt://svc:hunter2@host",
        "mqtts://svc:hunter2@host:8883",
        "mqtt://svc:hunter2#@host",
        "mqtt://svc:1#hunter2@host",
        "mqtt://svc:1?hunter2@host",
        "mqtt://svc:1/hunter2@host",
        "mqtt://svc:hunter2]@host",
        "mqtt://host?password=hunter2",
        "mqtt://svc:hunter2\u2100@host",
    ],
)
def test_a_password_in_the_url_is_refused_and_never_shown(url):
    with pytest.raises(ConfigError, match=r"broker\.url") as refused:
        load(environ={"TOKENBUS_BROKER_URL": url})
    assert "hunter2" not in str(refused.value)
    assert refused.value.__suppress_context__


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "No such file"), (b"", "is empty"), (b" \n", "is empty"), (b"\xff", "must be UTF-8")],
)
def test_password_files_that_hold_none_are_named(tmp_path, content, problem):
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file}: {problem}"):
        read_password(file)


def test_a_password_ends_before_the_line_does(tmp_path):
    file = tmp_path / "password"
    file.write_text("two words\n")
    assert read_password(file) == "two words"


def test_speculation_is_off_unless_told_and_drafts_less_than_a_block():
    assert Config().speculation() is None
    assert Config().worker().speculation is None
    config = load(flags={"engine.speculation": "ngram", "engine.max_draft": "15", "engine.cheap_tokens": "40"})
    speculation = config.speculation()
    assert speculation is not None
    assert (speculation.max_draft, speculation.cheap_tokens) == (15, 40)
    assert config.worker().speculation == "ngram"
    with pytest.raises(ConfigError, match=r"engine\.max_draft: must be less than engine\.block_size"):
        load(flags={"engine.speculation": "ngram", "engine.max_draft": "16"})


def test_what_does_not_go_with_tensor_parallel_is_refused(tmp_path):
    assert load(flags={"model.tensor_parallel": "2", "model.device": "cuda"}).worker().tensor_parallel == 2
    with pytest.raises(ConfigError, match=r"model\.device: must be of no number with model\.tensor_parallel"):
        load(flags={"model.tensor_parallel": "2", "model.device": "cuda:1"})
    file = tmp_path / "tokenbus.toml"
    file.write_text('[model]\ntensor_parallel = 2\nadapters = {terse = "/adapters/terse"}\n')
    with pytest.raises(ConfigError, match=r"model\.adapters: must be empty with model\.tensor_parallel"):
        load(file)


def test_unreadable_files_are_named(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text("[engine")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load(file)
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load(tmp_path / "none.toml")


def test_tenants_have_weights(tmp_path):
    file = tmp_path / "tokenbus.toml"
    file.write_text("[tenants.alice]\nweight = 2\n")
    assert load(file).tenants["alice"].weight == 2
    assert load(file).weights() == {"alice": 2}


def test_a_tenants_limits_are_its_own_else_those_for_all(tmp_path):
    assert Config().quota("alice") == Quota(1000)
    file = tmp_path / "tokenbus.toml"
    file.write_text(
        """
        [limits]
        outstanding_per_tenant = 50
        requests_per_s = 0.5
        tokens_per_min = 600
        [tenants.alice]
        outstanding = 7
        requests_per_s = 20
        max_context = 300
        [tenants.bob]
        weight = 2
        """
    )
    config = load(file, {"TOKENBUS_LIMITS_MAX_CONTEXT": "100"})
    assert config.quota("alice") == Quota(7, 20.0, 600, 300)
    assert config.quota("bob") == config.quota("nobody") == Quota(50, 0.5, 600, 100)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("weight = 0", "weight"),
        ("outstanding = 0", "outstanding"),
        ("requests_per_s = 0", "requests_per_s"),
        ("requests_per_s = inf", "requests_per_s"),
        ("requests_per_s = nan", "requests_per_s"),
        ("tokens_per_min = 0.5", "tokens_per_min"),
        ("tokens_per_min = 10_000_000_000", "tokens_per_min"),
        ("max_context = 0", "max_context"),
        ("max_contexts = 1", "unknown field `max_contexts`"),
    ],
)
@pytest.mark.parametrize("section", ["limits", "tenants.alice"])
def test_limits_that_can_not_be_are_refused_by_name(tmp_path, section, setting, message):
    file = tmp_path / "tokenbus.toml"
    file.write_text(f"[{section}]\n{setting}\n")
    with pytest.raises(ConfigError, match=message):
        load(file)


def test_a_tenant_that_no_topic_can_name_is_refused(tmp_path):
    file = tmp_path / "tokenbus.toml"
    file.write_text('[tenants."a/b"]\n')
    with pytest.raises(ConfigError, match=r"tenants\.a/b: must be 1 to 64"):
        load(file)


def test_a_reload_takes_tenants_and_limits_and_names_what_else_differs():
    old = load(flags={"engine.max_running": "4"})
    new = load(flags={"engine.max_running": "5", "journal.path": "off", "limits.outstanding": "9"})
    reloaded = old.reloaded(new)
    assert (reloaded.limits, reloaded.engine) == (new.limits, old.engine)
    assert reloaded.differences(new) == ["engine.max_running", "journal.path"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "postgresql://db/tokenbus", "path": "off"}, "only one of them"),
        ({"url": "sqlite:///file"}, "must look like postgresql://"),
        ({"url": "postgresql://[db/tokenbus"}, "must look like postgresql://"),
        ({"url": "postgresql://svc:hunter2@db/tokenbus"}, "must hold no password"),
        ({"url": "postgresql://svc@db/tokenbus?password=hunter2"}, "must hold no password"),
        ({"url": "postgresql://db/tokenbus", "lease_s": "0"}, "lease_s"),
    ],
)
def test_a_shared_journal_that_can_not_be_is_refused_and_no_password_told(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(flags={f"journal.{name}": value for name, value in settings.items()})
    assert "hunter2" not in str(caught.value)


def test_tiers_are_names_and_few(tmp_path):
    def loaded(*tiers: str) -> dict[str, str]:
        file = tmp_path / "tokenbus.toml"
        file.write_text("".join(f'[tenants.t{number}]\ntier = "{tier}"\n' for number, tier in enumerate(tiers)))
        return load(file).tiers()

    assert loaded("gold", "gold", "silver") == {"t0": "gold", "t1": "gold", "t2": "silver"}
    assert len(loaded(*"abcdefgh", *"abcdefgh")) == 16
    with pytest.raises(ConfigError, match="at most 8 tiers"):
        loaded(*"abcdefghi")
    with pytest.raises(ConfigError, match=r"tenants\.t0\.tier: must be 1 to 64 characters"):
        loaded("two words")
    with pytest.raises(ConfigError, match=r"metrics\.tenants"):
        load(flags={"metrics.tenants": "1001"})
