"""`vrthinker doctor`: run where parts are missing, broken or of another version."""

import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
from cli_run import vrthinker
from rich.console import Console

from vrthinker.doctor import examination
from vrthinker.doctor import report as doctor
from vrthinker.doctor.examination import Finding

ROOT = Path(__file__).parents[2]

# Argument 1: modules whose import fails, by comma. Says what was connected to on the last line.
PROGRAM = """
import sys
for name in filter(None, sys.argv[1].split(",")):
    sys.modules[name] = None
sockets = []
sys.addaudithook(lambda event, args: sockets.append(event) if event == "socket.connect" else None)
from vrthinker.doctor import report as doctor
code = doctor.main(as_json=sys.argv[2] == "json")
assert not sockets, sockets
sys.exit(code)
"""


def run_doctor(
    *, blocked: str = "", form: str = "json", in_front: Path | None = None
) -> subprocess.CompletedProcess[str]:
    path = [str(in_front)] if in_front else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, *filter(None, sys.path)])}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, blocked, form],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def by_part(result: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return findings_of(result.stdout, result.returncode, result.stderr)


def findings_of(out: str, code: int, err: str) -> dict[str, dict[str, Any]]:
    report = json.loads(out)
    assert report["schema_version"] == 1
    assert report["ok"] == (code == 0)
    findings = {finding["part"]: finding for finding in report["findings"]}
    needed = any(finding["required"] and finding["status"] == "missing" for finding in findings.values())
    assert code == int(needed), err
    return findings


def test_this_machine_has_what_its_tests_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("it connected to something"))
    done = vrthinker("doctor", "--json")
    findings = findings_of(done.out, done.code, done.err)
    for part in ("python", "torch", "transformers", "av", "pillow", "numpy"):
        assert (findings[part]["status"], findings[part]["required"]) == ("ok", True), findings[part]
    assert "Qwen2.5-VL and Qwen3-VL load" in findings["transformers"]["detail"]
    assert "build" in findings["torch"]["detail"]
    for codec in ("h264", "vp9", "mjpeg"):
        assert codec in findings["video decoders"]["detail"]
    assert set(findings) >= {
        part for part, _ in examination.CHECKS if part not in ("extras", "other packages", "engines")
    }
    engines = {name: findings[f"engine: {name}"] for name in ("hf", "vllm", "endpoint")}
    assert (engines["hf"]["status"], engines["endpoint"]["status"]) == ("ok", "ok")
    if importlib.util.find_spec("vllm") is None:
        assert engines["vllm"]["status"] == "missing"
        assert engines["vllm"]["detail"] == "vLLM is not installed"
        assert "make vllm-env" in engines["vllm"]["remedy"]
    assert all(finding["detail"] and finding["needed_for"] for finding in findings.values())
    assert not any("could not be examined" in finding["detail"] for finding in findings.values())


@pytest.mark.multi_process
def test_without_pyav_the_rest_is_still_examined() -> None:
    result = run_doctor(blocked="av,torch,transformers")
    findings = by_part(result)
    assert result.returncode == 1
    assert findings["av"]["status"] == "missing"
    assert "cannot be imported" in findings["av"]["detail"]
    assert findings["av"]["needed_for"] == "reading videos"
    assert findings["av"]["remedy"] == "pip install --force-reinstall 'av>=18'"
    assert findings["pillow"]["status"] == "ok"
    assert "video decoders" not in findings


@pytest.mark.multi_process
def test_with_nothing_there_it_still_reports() -> None:
    blocked = "av,torch,transformers,numpy,PIL,torchvision,vrthinker._core,vrthinker.kernels,triton,nvidia"
    result = run_doctor(blocked=blocked)
    findings = by_part(result)
    assert result.returncode == 1
    for part in ("av", "torch", "transformers", "numpy", "pillow", "native core"):
        assert findings[part]["status"] == "missing", findings[part]
    assert findings["native core"]["required"] is False
    assert {"CUDA", "CPU and memory", "disk", "python"} <= set(findings)


@pytest.mark.slow  # imports torch and transformers in a process of its own
@pytest.mark.guard
@pytest.mark.multi_process
def test_a_torchvision_that_breaks_transformers_is_named(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    info = tmp_path / "torchvision-0.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n")
    result = run_doctor(in_front=tmp_path, blocked="av")
    findings = by_part(result)
    assert result.returncode == 1
    assert findings["torchvision"]["status"] == "warning"
    assert findings["torchvision"]["detail"].startswith("0.20.0, cannot be imported: RuntimeError: operator")
    assert "uninstall" in findings["torchvision"]["remedy"]
    # Whether transformers dies of it is its own affair; where it does, the report says of what.
    transformers = findings["transformers"]
    assert transformers["status"] == "ok" or "torchvision::nms" in transformers["detail"]


@pytest.mark.multi_process
def test_a_package_that_breaks_on_import_is_told_from_one_that_is_absent(tmp_path: Path) -> None:
    (tmp_path / "av").mkdir()
    (tmp_path / "av" / "__init__.py").write_text("raise OSError('libavcodec.so.61: undefined symbol\\nmore')")
    result = run_doctor(blocked="torch,transformers", in_front=tmp_path)
    findings = by_part(result)
    assert result.returncode == 1
    assert findings["av"]["detail"].endswith(
        "cannot be imported: OSError: libavcodec.so.61: undefined symbol"
    )


@pytest.mark.multi_process
def test_the_table_is_for_people() -> None:
    result = run_doctor(blocked="av,torch,transformers", form="table")
    assert result.returncode == 1
    assert "missing" in result.stdout
    assert "reading" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.multi_process
def test_importing_the_doctor_loads_nothing_heavy() -> None:
    program = (
        "import sys, vrthinker.doctor.report; "
        "heavy = {'torch', 'av', 'numpy', 'transformers', 'PIL', 'rich', 'pydantic'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_ranges_and_extras_are_those_of_the_project() -> None:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("run from outside the source tree: no pyproject.toml to compare with")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {"python" + project["requires-python"], *project["dependencies"]}
    for name, (low, high) in examination.RANGES.items():
        assert f"{name}>={low}{f',<{high}' if high else ''}" in requirements
    assert set(examination.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}


def test_extras_that_nothing_uses_are_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_has_distribution", lambda name: False)
    requirements = {extra: [] for extra in examination.EXTRAS}
    for name, extra in examination._requirements():
        if extra in requirements:
            requirements[extra].append(name)
    for finding in examination._extras():
        names = requirements[finding.part.removeprefix("extra: ")]
        if examination.UNUSED.issuperset(set(names) - {"pydantic"}):
            assert (finding.status, finding.detail) == ("ok", "not used by this version")
            assert finding.remedy == ""
        else:
            used = [name for name in names if name not in examination.UNUSED | {"pydantic"}]
            assert finding.detail == f"no {', '.join(used)}"
            assert finding.remedy.startswith("pip install 'vrthinker[")


def test_what_is_called_unused_is_imported_nowhere() -> None:
    package = Path(examination.__file__).parents[1]
    modules = "|".join(examination.UNUSED)
    imports = re.compile(rf"^\s*(import|from) ({modules})\b|import_module\(.({modules})\b", re.MULTILINE)
    for path in package.rglob("*.py"):
        assert not imports.search(path.read_text()), f"{path}: take it out of UNUSED"


@pytest.mark.parametrize(
    ("name", "version", "allowed"),
    [
        ("transformers", "5.16.9", ">=5.17,<5.24"),
        ("transformers", "5.17", None),
        ("transformers", "5.23.4", None),
        ("transformers", "5.24.0.dev0", ">=5.17,<5.24"),
        ("transformers", "6.0", ">=5.17,<5.24"),
        ("torch", "2.9.1+cu128", ">=2.11"),
        ("torch", "2.11.0+cpu", None),
        ("torch", "3.0", None),
        ("pillow", "unknown", ">=11"),
    ],
)
def test_versions_out_of_range_are_told(name: str, version: str, allowed: str | None) -> None:
    assert examination._out_of_range(name, version) == allowed


def test_an_installed_version_out_of_range_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "pillow-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 9.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = examination._pillow()
    assert (finding.status, finding.detail) == ("missing", "got 9.0, allowed: >=11")
    assert finding.remedy == "pip install 'pillow>=11'"
    assert doctor.exit_code([finding]) == 1


def test_a_decoder_that_is_not_there_is_named_and_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(examination.DECODERS, "vp9", ("vp9-of-nobody",))
    package, decoders = examination._pyav()
    assert package.status == "ok"
    assert decoders.status == "missing"
    assert decoders.detail.startswith("no vp9; has h264")
    assert doctor.exit_code([package, decoders]) == 0


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise OSError("no /proc here\nsecond line")

    monkeypatch.setattr(doctor, "CHECKS", (("disk", broken), ("python", examination._python)))
    first, second = doctor.examine()
    assert (first.part, first.status) == ("disk", "warning")
    assert first.detail == "could not be examined: OSError: no /proc here"
    assert second.part == "python"


def test_a_gpu_that_nothing_can_use_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(
        examination, "_probe", lambda: {"device_count": 1, "devices": [{"name": "NVIDIA H200"}]}
    )
    (finding,) = examination._cuda()
    assert (finding.status, finding.required) == ("warning", False)
    assert finding.detail == "NVIDIA H200 is here, torch cannot use it"


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_memory() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (finding,) = examination._cuda()
    assert finding.status == "ok"
    assert torch.cuda.get_device_name(0) in finding.detail
    assert "GiB, compute " in finding.detail


def test_only_a_required_part_that_is_missing_fails() -> None:
    def finding(status: Any, required: bool) -> Finding:
        return Finding("part", status, "detail", "nothing", "", required)

    assert doctor.exit_code([]) == 0
    assert doctor.exit_code([finding("missing", False), finding("warning", True), finding("ok", True)]) == 0
    assert doctor.exit_code([finding("ok", True), finding("missing", True)]) == 1


def test_the_table_shows_brackets_as_they_are() -> None:
    table = doctor.render([Finding("extra: dali", "missing", "none", "GPU", "pip install 'vrthinker[dali]'")])
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    assert "pip install 'vrthinker[dali]'" in stream.getvalue()
    assert "optional" in stream.getvalue()
    assert "for GPU" in stream.getvalue()


def test_the_disk_is_the_one_of_a_cache_that_is_not_made_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    (finding,) = examination._disk()
    assert str(tmp_path / "not" / "there" / "hub") in finding.detail
    assert not (tmp_path / "not").exists()
