"""The chart, rendered by Helm's own code and held against the schemas of Kubernetes and of the operators it is for."""

import copy
import json
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helm_python import HelmRenderError, HelmValuesError
from helm_python.chart import Chart, lint

from scheduler.sources import load

CHART = Path(__file__).parents[2] / "deploy/helm/tokenbus"
EVERYTHING = {
    "gpu": {"count": 2},
    "modelClaim": "models",
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "persistence": {"size": "20Gi", "storageClass": "fast"},
    "podMonitor": {"labels": {"release": "prometheus"}},
    "autoscaling": {"enabled": True, "maxQueueAgeS": 2.5},
    "secrets": {"metrics": "tokenbus-metrics"},
    "settings": {
        "model": {"path": "/models/llama", "alias": "llama", "tensor_parallel": 2},
        "journal": {"url": "postgresql://tokenbus@postgres/tokenbus"},
        "engine": {"max_running": 32, "shared_prefixes": ["You are terse."]},
        "service": {"drain_s": 120.5},
        "tenants": {"alice": {"weight": 2, "tokens_per_min": 60000}},
    },
}
SHARED = {"journal": EVERYTHING["settings"]["journal"]}


def render(**values: object) -> dict[str, dict]:
    """Manifests by their kind."""
    rendered = Chart.load(CHART).render(values, name="bus", namespace="llm")
    manifests = [yaml.safe_load(text) for name, text in rendered.items() if name.endswith(".yaml")]
    return {manifest["kind"]: manifest for manifest in manifests if manifest}


def pod(**values: object) -> dict:
    return render(**values)["StatefulSet"]["spec"]["template"]


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_kubernetes_knows_what_is_rendered(values):
    manifests = render(**copy.deepcopy(values))
    for kind in ("StatefulSet", "Service", "ConfigMap", "PodDisruptionBudget"):
        kubernetes_validate.validate(manifests[kind], "1.27", strict=True)
        kubernetes_validate.validate(manifests[kind], "1.37", strict=True)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the generated models' own field names
def test_the_operators_know_what_is_rendered_for_them():
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor

    manifests = render(**EVERYTHING)
    for kind, model in (("ScaledObject", ScaledObject), ("PodMonitor", PodMonitor)):
        read = model.model_validate(manifests[kind])
        # The models pass over a field they don't know, and then it is missing here.
        assert read.model_dump(mode="json", by_alias=True, exclude_unset=True) == manifests[kind]


def test_operators_objects_are_optional():
    assert "PodMonitor" in render()
    assert "ScaledObject" not in render()
    assert "PodMonitor" not in render(podMonitor={"enabled": False})


def test_helm_finds_nothing_to_warn_of():
    report = lint(CHART, strict=True)
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_the_service_accepts_its_settings(values, tmp_path):
    values = copy.deepcopy(values)
    manifests = render(**values)
    file = tmp_path / "tokenbus.toml"
    file.write_text(manifests["ConfigMap"]["data"]["tokenbus.toml"])
    config = load(file)
    (container,) = manifests["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(Path(config.broker.key_file).parent) in mounts
    assert container["ports"][0]["containerPort"] == config.metrics.port
    for section, settings in values.get("settings", {}).items():
        if section != "tenants":
            assert {name: getattr(getattr(config, section), name) for name in settings} == settings
    assert set(config.tenants) == set(values.get("settings", {}).get("tenants", {}))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 2}, "replica"),
        ({"settings": {"engine": {"max_runing": 2}}}, "max_runing"),
        ({"settings": {"engine": {"max_running": 0}}}, "/settings/engine/max_running"),
        ({"autoscaling": {"maxQueueAgeS": 0}}, "/autoscaling/maxQueueAgeS"),
        ({"secrets": {"No/Folder": "x"}}, "No/Folder"),
        ({"podDisruptionBudget": {"maxUnavailable": "most"}}, "/podDisruptionBudget/maxUnavailable"),
    ],
)
def test_values_that_cannot_be_are_refused_with_their_name(values, named):
    with pytest.raises(HelmValuesError, match=named):
        Chart.load(CHART).validate_schema(values)


def test_every_value_is_described():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(schema["properties"]) - {"global"} == set(values)


def test_a_pod_has_time_to_drain():
    assert pod()["spec"]["terminationGracePeriodSeconds"] == 45
    assert pod(settings={"service": {"drain_s": 120.5}})["spec"]["terminationGracePeriodSeconds"] == 136


def test_a_pod_restarts_for_settings_that_need_it_and_for_no_others():
    def checksum(**settings: object) -> str:
        return pod(settings=settings)["metadata"]["annotations"]["checksum/settings"]

    assert checksum(tenants={"alice": {}}, limits={"outstanding": 9}) == checksum()
    assert checksum(engine={"max_running": 9}) != checksum()


def test_it_is_restricted_as_pod_security_wants():
    """Everything that https://kubernetes.io/docs/concepts/security/pod-security-standards/ asks of ``restricted``."""
    spec = pod(**EVERYTHING)["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "name"}
    assert set().union(*spec["volumes"]) <= allowed
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)


def test_what_is_autoscaled_has_no_count_of_its_own():
    assert render(replicas=3, settings=SHARED)["StatefulSet"]["spec"]["replicas"] == 3
    assert "replicas" not in render(**EVERYTHING)["StatefulSet"]["spec"]


def test_a_gpu_is_asked_for_beside_the_other_limits():
    two = {"model": {"tensor_parallel": 2}}
    (container,) = pod(gpu={"count": 2, "resource": "amd.com/gpu"}, settings=two)["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "8Gi", "amd.com/gpu": 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 2}, r"settings\.journal\.url: must be given for more than one replica"),
        ({"autoscaling": {"enabled": True}}, r"settings\.journal\.url: must be given for more than one replica"),
        ({"gpu": {"count": 2}}, r"gpu\.count: must be settings\.model\.tensor_parallel, 1"),
        ({"gpu": {"count": 1}, "settings": {"model": {"tensor_parallel": 2}}}, r"gpu\.count: must be .*, 2"),
    ],
)
def test_values_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(HelmRenderError, match=message):
        render(**values)
