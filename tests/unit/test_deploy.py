"""The files for deployment fit the code: settings, commands, metrics and alerts.

They are safe to use unchanged. These tests start nothing and need no tool but Python.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from celery.bin.celery import celery
from flower.command import flower
from flower.options import default_options
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rlm_tasks.celery import app
from rlm_tasks.metrics.declared import DECLARED, Histogram
from rlm_tasks.settings.document import validate
from rlm_tasks.telemetry.exposition import DECLARING, WorkerState, registry
from tests.integration.pages import PAGES, steps
from tests.integration.pages import read as read_page

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
PAGE = PAGES["docs/deployment.md"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SHIPPED = [
    ROOT / "compose.yaml",
    ROOT / "Dockerfile",
    *sorted(each for each in DEPLOY.rglob("*") if each.is_file()),
]
SECRET = re.compile(r"PASSWORD|SECRET|AUTH|TOKEN|_URL$")
REQUIRED = re.compile(r"\$\{\w+:\?[^}]+\}")


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


MANIFESTS = [
    document
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]
PODS = {
    each["metadata"]["name"]: each["spec"]["template"]["spec"]
    for each in MANIFESTS
    if each["kind"] == "Deployment"
}
RULES = [rule for group in read("prometheus/alerts.yaml")["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/rlm.json").read_text(encoding="utf-8"))
PANELS = [each for each in DASHBOARD["panels"] if each["type"] != "row"]
SCALED = next(each for each in MANIFESTS if each["kind"] == "ScaledObject")


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in MANIFESTS if each["kind"] == kind}


# --- settings ---------------------------------------------------------------------------------


def interpolated(text: str) -> str:
    """Return a value as Compose makes it: a default, or a placeholder for a required one."""
    return re.sub(
        r"\$\{\w+:([-?])([^}]*)\}",
        lambda command_of: command_of[2] if command_of[1] == "-" else "given",
        text,
    )


def environments() -> Iterator[tuple[str, dict[str, str]]]:
    for name, service in SERVICES.items():
        yield (
            f"compose: {name}",
            {
                key: interpolated(str(value))
                for key, value in service.get("environment", {}).items()
            },
        )
    settings = of_kind("ConfigMap")["settings"]["data"]
    for name, pod in PODS.items():
        own = {
            each["name"]: "redis://redis:6379/0"
            for each in pod["containers"][0]["env"]
            if each["name"] == "RLM_REDIS_URL"
        }
        yield f"kubernetes: {name}", settings | own
    yield "Dockerfile", dict(re.findall(r"\b([A-Z][A-Z0-9_]*)=(\S+)", DOCKERFILE))


@pytest.mark.parametrize(("where", "environment"), list(environments()))
def test_every_variable_is_a_setting(
    where: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        assert isinstance(value, str), f"{where}: {name} must be quoted"
        monkeypatch.setenv(name, value)

    assert validate(os.environ) == []


def test_no_file_contains_a_secret() -> None:
    for path in SHIPPED:
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"://[^/\s@]*:(?!\$\{)[^/\s@]+@", text) == [], path
        assert re.findall(r"requirepass (?!\$\$)\S+", text) == [], path
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            assert not SECRET.search(variable) or REQUIRED.search(str(value)), f"{name}: {variable}"
    for pod in PODS.values():
        for each in pod["containers"][0]["env"]:
            assert "secretKeyRef" in each["valueFrom"]
    assert not of_kind("Secret")
    assert not any(SECRET.search(name) for name in of_kind("ConfigMap")["settings"]["data"])


def test_the_build_context_has_all_files_and_no_secret() -> None:
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()

    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
        for name in line.split()
    }

    assert "*" in sent
    assert copied == {line[1:] for line in sent if line.startswith("!")}
    assert [name for name in copied if not (ROOT / name).exists()] == []


# --- the image --------------------------------------------------------------------------------

IMAGE = set(re.findall(r"-c constraints.txt '\.\[([\w,]+)\]'", DOCKERFILE)[0].split(","))
"""The extras of the image."""
TRIALS = {"embedded"}
"""Extras of pages that are for trials on one machine."""


@cache
def owners() -> dict[str, set[str]]:
    """Return the packages that each module on top belongs to, by their normalised names."""
    found = metadata.packages_distributions()
    return {name: {canonicalize_name(each) for each in owned} for name, owned in found.items()}


@cache
def distributions(*wanted: str) -> set[str]:
    """Return the packages that a set-up installs, by their normalised names."""
    found, left = set[str](), [Requirement(each) for each in wanted]
    while left:
        wish = left.pop()
        key = f"{canonicalize_name(wish.name)}[{','.join(sorted(wish.extras))}]"
        if key in found:
            continue
        found.add(key)
        for line in metadata.requires(wish.name) or []:
            need = Requirement(line)
            extras = wish.extras or {""}
            if need.marker is None or any(need.marker.evaluate({"extra": one}) for one in extras):
                left.append(need)
    return {key.partition("[")[0] for key in found}


def modules_of(extra: str) -> set[str]:
    """Return the modules that an extra adds to the platform's own requirements."""
    added = distributions(f"rlm-tasks[{extra}]") - distributions("rlm-tasks")
    return {module for module, packages in owners().items() if packages <= added}


def test_the_image_has_each_extra_that_a_running_platform_imports() -> None:
    """The folder `testing` and the demo are for trials; they are all that imports the server."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    imported = {
        module.partition(".")[0]
        for file in (ROOT / "rlm_tasks").rglob("*.py")
        if "testing" not in file.parts and file.name != "demo.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for module in named_by(node)
    }

    extras = project["optional-dependencies"].keys() - {"dev", *TRIALS}
    assert {extra for extra in extras if modules_of(extra) & imported} == IMAGE


def named_by(node: ast.AST) -> list[str]:
    """Return the modules that a statement imports, or looks for by name."""
    match node:
        case ast.Import(names=names):
            return [each.name for each in names]
        case ast.ImportFrom(module=str(module)):
            return [module]
        case ast.Call(func=ast.Attribute(attr="find_spec"), args=[ast.Constant(value=str(name))]):
            return [name]
        case ast.Call(func=ast.Name(id="find_spec"), args=[ast.Constant(value=str(name))]):
            return [name]
    return []


def test_the_image_has_the_extras_of_every_page() -> None:
    named = {
        extra
        for text in PAGES.values()
        for extras in re.findall(r"(?:rlm-tasks|'\.)\[([\w,]+)\]", text)
        for extra in extras.split(",")
    }
    (sentence,) = re.findall(r"^The image has the extras (.*)\.$", PAGE, re.MULTILINE)

    assert named - TRIALS == IMAGE
    assert set(re.findall(r"`(\w+)`", sentence)) == IMAGE


def test_a_worker_of_the_image_knows_the_operations_of_the_pages() -> None:
    """Only packages of the image can be imported."""
    installed = distributions(f"rlm-tasks[{','.join(IMAGE)}]") | {"rlm-tasks"}
    absent = sorted(module for module, packages in owners().items() if not packages & installed)
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        "from rlm_tasks.operations import registry\n"
        "registry.import_operations(())\n"
        "import rlm_tasks.celery, rlm_tasks.worker.bootsteps, rlm_tasks.telemetry.tracing\n"
        "import flower, redbeat, opentelemetry.sdk\n"
        "print(*registry.names())"
    )
    known = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    promised = {
        name for text in PAGES.values() for name in re.findall(r"`(llm\.[a-z_]+)`", text)
    } - {"llm.md"}

    assert {"openai", "opentelemetry"}.isdisjoint(absent)
    assert len(promised) >= 3
    assert promised <= set(known)


# --- commands ---------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """Yield every one of our commands, as it is written."""
    for service in SERVICES.values():
        yield from in_container(service.get("command", []))
        yield from in_container(service["healthcheck"]["test"])
    for pod in PODS.values():
        container = pod["containers"][0]
        yield from in_container(container["args"])
        yield from in_container(
            container.get("readinessProbe", {}).get("exec", {}).get("command", [])
        )
    yield from in_container(json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[0]))
    yield from (begin_with(rule) for rule in RULES)


def of_page(name: str) -> Iterator[str]:
    """Yield the commands that a page names or passes to another program; other blocks are run
    elsewhere.
    """
    yield from re.findall(r"`(celery -A rlm_tasks [^`|\n]*[^`|\n.])`", PAGES[name])
    for block in read_page(name, PAGES[name]):
        for step in steps(block) if block.language == "sh" else ():
            if step.elsewhere:
                yield from re.findall(r"celery -A rlm_tasks [^|#'\n]*", step.text)


def in_container(words: list[str]) -> Iterator[str]:
    if words[:1] == ["celery"]:
        yield shlex.join(words)
    for word in words:
        yield from re.findall(r"celery -A rlm_tasks [^|]*", word)


def begin_with(rule: dict[str, Any]) -> str:
    """Return the command at the end of an alert."""
    _, command, arguments = rule["annotations"]["description"].rpartition("celery -A rlm_tasks ")
    return str(command + arguments)


def parse(line: str) -> None:
    """Raise click's error for a command that the program would not accept; nothing is run."""
    program, option, name, *words = shlex.split(line)
    assert (program, option, name) == ("celery", "-A", "rlm_tasks")
    command, context = command_of(line, words)
    if command is flower:
        assert [
            word
            for word in words
            if word[:2] != "--" or word[2:].partition("=")[0] not in default_options
        ] == []
        return
    known = [*command.params, *app.user_options.get(command.name, ())]
    values, rest, _ = (
        click.Command(command.name, params=known).make_parser(context).parse_args(words)
    )
    assert rest == [], line
    for each in known:
        if each.name in values and isinstance(
            each.type, click.INT.__class__ | click.FLOAT.__class__ | click.Choice
        ):
            each.type_cast_value(context, values[each.name])


def command_of(line: str, words: list[str]) -> tuple[click.Command, click.Context]:
    """Return the command that a line calls, and remove its words from the line."""
    command: click.Command = celery
    context = click.Context(celery)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        inner = command.get_command(context, words.pop(0))
        assert inner is not None, f"{line}: there is no such command"
        command, context = inner, click.Context(inner, parent=context, info_name=inner.name)
    return command, context


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_can_be_parsed(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_command_of_a_page_can_be_parsed(name: str) -> None:
    for line in of_page(name):
        parse(line)


@pytest.mark.parametrize(
    "wrong",
    [
        "worker --slots 4",
        "rlm presure",
        "flower --adress=0.0.0.0",
        "rlm pressure history --limit x",
    ],
)
def test_an_unknown_command_is_detected(wrong: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        parse(f"celery -A rlm_tasks {wrong}")


def test_the_files_named_by_the_page_exist() -> None:
    named = re.findall(r"\bdocs/deploy/[\w./-]+", PAGE) + [
        f"docs/deploy/kubernetes/{each}" for each in re.findall(r"`(\w+\.yaml)`", PAGE)
    ]

    assert named
    assert [each for each in named if not (ROOT / each).exists()] == []


def test_the_page_lists_every_alert_with_its_command() -> None:
    rows = dict(re.findall(r"^\| `(Rlm\w+)`[^|]*\| [^|]* \| `([^`]+)` \|$", PAGE, re.MULTILINE))

    assert rows == {rule["alert"]: begin_with(rule) for rule in RULES}


# --- Compose ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check_limits_and_no_public_port(name: str) -> None:
    service = SERVICES[name]

    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]*|[\w./-]+:v\d[\w.-]*", service["image"])
    assert [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")] == []
    for volume in service.get("volumes", []):
        source = interpolated(volume).split(":")[0]
        assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def test_all_queues_have_a_worker_and_redis_persists() -> None:
    consumed = {
        queue
        for each in SERVICES.values()
        if "-Q" in each.get("command", ())
        for queue in _queues(each["command"])
    }
    redis = " ".join(SERVICES["redis"]["command"])

    assert (
        consumed
        == set(_queues(PODS["worker"]["containers"][0]["args"]))
        == {queue.name for queue in app.conf.task_queues}
    )
    for option in ("--appendonly yes", "--appendfsync everysec", "--maxmemory-policy noeviction"):
        assert option in redis


def _queues(words: list[str]) -> list[str]:
    return words[words.index("-Q") + 1].split(",")


def test_images_have_tags() -> None:
    images = [container["image"] for pod in PODS.values() for container in pod["containers"]]
    images += re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)

    assert [each for each in images if not re.search(r":\d", each)] == []
    assert {container["image"] for pod in PODS.values() for container in pod["containers"]} == {
        SERVICES["worker"]["image"]
    }


# --- Kubernetes -------------------------------------------------------------------------------


def test_the_kustomization_has_every_manifest() -> None:
    listed = read("kubernetes/kustomization.yaml")["resources"]

    assert sorted(listed) == sorted(
        {each.name for each in (DEPLOY / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    )


@pytest.mark.parametrize("name", PODS)
def test_pods_have_probes_limits_and_a_restricted_context(name: str) -> None:
    pod = PODS[name]
    (container,) = pod["containers"]

    assert (
        container["resources"]["limits"].keys()
        == container["resources"]["requests"].keys()
        == {"cpu", "memory"}
    )
    assert pod["securityContext"]["runAsNonRoot"]
    assert (
        f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
        in DOCKERFILE
    )
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert pod["terminationGracePeriodSeconds"] >= 30
    # A Service in the namespace would become FLOWER_PORT, which Flower reads, or RLM_..., which
    # stops the process.
    assert pod["enableServiceLinks"] is False
    assert "readinessProbe" in container


def test_the_probes_of_a_worker_depend_on_the_worker_alone() -> None:
    (container,) = PODS["worker"]["containers"]

    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert container["ports"] == [
        {"name": "metrics", "containerPort": _default("worker", "metrics_port")}
    ]


def _default(command: str, option: str) -> Any:
    return next(each.default for each in app.user_options[command] if each.name == option)


def test_selectors_find_their_pods_and_monitors_their_ports() -> None:
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in of_kind("Deployment").values()
    }

    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        for name, each in of_kind(kind).items():
            assert each["spec"]["selector"]["matchLabels"] == labels[name]
    for name, each in of_kind("PodMonitor").items():
        assert each["spec"]["podMetricsEndpoints"][0]["port"] in {
            port["name"] for port in PODS[name]["containers"][0]["ports"]
        }


def test_keda_and_the_scaling_advice_have_the_same_bounds() -> None:
    settings, spec = of_kind("ConfigMap")["settings"]["data"], SCALED["spec"]

    assert spec["scaleTargetRef"]["name"] in PODS
    assert "replicas" not in of_kind("Deployment")["worker"]["spec"]
    assert str(spec["minReplicaCount"]) == settings["RLM_AUTOSCALE__MIN_WORKERS"]
    assert str(spec["maxReplicaCount"]) == settings["RLM_AUTOSCALE__MAX_WORKERS"]
    assert spec["minReplicaCount"] >= 1
    assert all(isinstance(value, str) for value in spec["triggers"][0]["metadata"].values())


# --- metrics ----------------------------------------------------------------------------------

DURATION = re.compile(r"(\d+(ms|s|m|h|d))+")
TARGET_LABELS = {"job", "instance"}


@cache
def exposed() -> dict[str, set[str]]:
    """Return the labels of every metric, by the names that Prometheus has."""
    with tempfile.TemporaryDirectory() as folder:
        exposition = registry(
            Path(folder), lambda: WorkerState(1, 0, False, 0, 0.0, 0, {"mail": "closed"})
        )
        gauges = {
            sample.name: set(sample.labels)
            for family in exposition.collect()
            for sample in family.samples
        }
    command_of = {"up": set[str]()} | gauges
    ours = [
        each
        for each in DECLARED.values()
        if any(each in vars(module).values() for module in DECLARING)
    ]  # other metrics belong to tests and users
    for each in ours:
        if isinstance(each, Histogram):
            command_of |= {
                f"{each.name}_bucket": {*each.labels, "le"},
                f"{each.name}_sum": set(each.labels),
            }
            command_of[f"{each.name}_count"] = set(each.labels)
        else:
            command_of[each.name] = set(each.labels)
    return command_of | dict(of_cluster())


def of_cluster() -> Iterator[tuple[str, set[str]]]:
    source = (ROOT / "rlm_tasks" / "flower" / "gauges.py").read_text(encoding="utf-8")
    for call in ast.walk(ast.parse(source)):
        match call:
            case ast.Call(args=[ast.Constant(value=str(name)), _, ast.Tuple(elts=labels), *_]) if (
                name.startswith("rlm_")
            ):
                yield name, {each.value for each in labels if isinstance(each, ast.Constant)}
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if name.startswith("rlm_"):
                yield name, set()


def check(expression: str) -> set[str]:
    """Return the labels of the answer to a query.

    Fail for a query with brackets that do not match, or with an unknown metric or label.
    """
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing), expression
    bare = re.sub(r'"[^"]*"', "", expression)
    for inner in re.findall(r"\[([^\]]*)\]", bare):
        assert inner == "$__rate_interval" or DURATION.fullmatch(inner), expression
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    matched = {
        label
        for inner in re.findall(r"\{([^}]*)\}", bare)
        for label in re.findall(r"(\w+)\s*[=!]", inner)
    }
    bare = re.sub(r"\{[^}]*\}", "", bare)
    grouped = {
        label
        for inner in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", bare)
        for label in re.findall(r"\w+", inner)
    }
    bare = re.sub(r"\b(by|on)\s*\([^)]*\)", "", bare)
    names = set(re.findall(r"\b[a-zA-Z_]\w*\b(?!\s*\()", bare)) - {"and", "or", "unless"}
    assert names, expression
    assert names <= exposed().keys(), (
        f"{expression}: there is no {', '.join(names - exposed().keys())}"
    )
    labels = TARGET_LABELS.union(*(exposed()[name] for name in names))
    assert matched | grouped <= labels, expression
    return grouped or labels


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_are_well_formed_and_end_with_a_command(rule: dict[str, Any]) -> None:
    labels = check(rule["expr"])
    assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= labels
    assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Rlm[A-Za-z]+", rule["alert"])
    assert DURATION.fullmatch(rule["for"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert begin_with(rule).startswith("celery -A rlm_tasks rlm ")


def recipes() -> dict[str, str]:
    """Return the runbook's sections: each anchor, as GitHub makes it, with its text."""
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in sections[::2]]
    return dict(zip(anchors, sections[1::2], strict=True))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_name_a_recipe_that_ends_with_a_command(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")

    assert page == "docs/runbook.md"
    assert recipes()[anchor].rstrip().endswith("```")
    assert "\ncelery -A rlm_tasks " in recipes()[anchor]


def test_the_runbook_lists_every_alert_with_its_recipe() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`Rlm[^|]*) \| \[[^]]*\]\(#([\w-]+)\) \|$", text, re.MULTILINE)
    listed = {alert: anchor for alerts, anchor in rows for alert in re.findall(r"`(\w+)`", alerts)}

    assert listed == {
        rule["alert"]: rule["annotations"]["runbook"].partition("#")[2] for rule in RULES
    }


def test_alerts_have_different_names() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_queries_of_the_pages_use_existing_metrics() -> None:
    queries = [
        block.text
        for name, text in PAGES.items()
        for block in read_page(name, text)
        if block.language == "promql"
    ]

    assert queries
    for query in queries:
        check(query)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_uses_existing_metrics(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= check(target["expr"])


def test_the_dashboard_has_its_rows_and_nothing_overlaps() -> None:
    rows = [each["title"] for each in DASHBOARD["panels"] if each["type"] == "row"]
    cells = [
        (x, y)
        for at in (each["gridPos"] for each in DASHBOARD["panels"])
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]

    assert rows == [
        "Overview",
        "Queues",
        "Pressure",
        "Workers",
        "Operations",
        "Limits and breakers",
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({each["id"] for each in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_scaling_uses_existing_metrics() -> None:
    check(SCALED["spec"]["triggers"][0]["metadata"]["query"])


@pytest.mark.parametrize(
    "wrong",
    [
        "rlm_presure",
        "sum by (flavour) (rlm_jobs)",
        'rlm_jobs{stat="open"}',
        "rate(rlm_items_total[5])",
        "sum(rlm_jobs",
    ],
)
def test_a_query_for_a_missing_metric_is_detected(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


def test_prometheus_and_grafana_find_each_other_and_their_files() -> None:
    prometheus, datasource = (
        read("prometheus/prometheus.yaml"),
        read("grafana/provisioning/datasources/prometheus.yaml"),
    )
    jobs = {each["job_name"] for each in prometheus["scrape_configs"]}
    workers = next(
        each for each in prometheus["scrape_configs"] if each["job_name"] == "rlm-workers"
    )["dns_sd_configs"][0]
    monitors = [
        each["spec"]["podMetricsEndpoints"][0]["relabelings"][0]["replacement"]
        for each in of_kind("PodMonitor").values()
    ]
    (provider,) = read("grafana/provisioning/dashboards/rlm.yaml")["providers"]

    assert set(monitors) == jobs
    assert set(re.findall(r'job="([^"]+)"', " ".join(rule["expr"] for rule in RULES))) <= jobs
    assert workers["names"] == [
        name for name, each in SERVICES.items() if "worker" in each.get("command", ())
    ]
    assert workers["port"] == _default("worker", "metrics_port")
    assert datasource["datasources"][0]["url"] == "http://prometheus:9090"
    assert (
        f"./docs/deploy/grafana/dashboards:{provider['options']['path']}:ro"
        in SERVICES["grafana"]["volumes"]
    )
    assert [Path(each).name for each in prometheus["rule_files"]] == ["alerts.yaml"]
