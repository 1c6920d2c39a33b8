"""`slothcore doctor`: what is missing is a problem with a remedy, and to have no GPU is none."""

import importlib.metadata
import json
import sys

import pytest
import torch

from slothcore.cli import main
from slothcore.commands import checkup, gpu_checkup
from slothcore.commands.checkup import check_disk, check_hub, check_package, check_packages, release
from slothcore.commands.findings import Finding
from slothcore.commands.gpu_checkup import examine_gpu, run_8bit_update, run_kernels

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU says something else")


def findings(capsys: pytest.CaptureFixture[str], *, status: int) -> dict[str, Finding]:
    capsys.readouterr()
    assert main(["doctor", "--json"]) == status
    return {values["name"]: Finding(**values) for values in json.loads(capsys.readouterr().out)}


@without_gpu
def test_a_machine_without_gpu_can_train_on_its_cpu(capsys, monkeypatch) -> None:
    monkeypatch.setattr(gpu_checkup, "DEVICE_FILES", ())
    monkeypatch.setattr(gpu_checkup, "driver_version", lambda: None)
    found = findings(capsys, status=0)
    assert {finding.status for finding in found.values()} <= {"ok", "warning"}
    assert found["GPU"].text == "none: training runs on the CPU"
    assert found["kernels"].text.startswith("not run: a GPU is needed")
    assert found["training on"].text == "the CPU"
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("\nno problem found: slothcore can train on the CPU\n")
    assert all(f"  {name} " in output for name in found)


@without_gpu
@pytest.mark.parametrize(
    ("driver", "built", "text", "remedy"),
    [
        ("570.1", None, "this torch is built for the CPU only", "pip install --force-reinstall torch --index-url"),
        (None, "12.8", "no NVIDIA driver is loaded", "nvidia-smi"),
        ("470.82", "12.8", "the driver 470.82 is there, but torch (CUDA 12.8) cannot use it", "update the driver"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_a_problem(driver, built, text, remedy, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_checkup, "DEVICE_FILES", ("/dev/null",))
    monkeypatch.setattr(gpu_checkup, "driver_version", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    found = findings(capsys, status=1)
    assert found["GPU"].status == "problem"
    assert text in found["GPU"].text
    assert found["GPU"].remedy.startswith(remedy)
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert f"-> {remedy}" in output
    assert "checks found a problem: GPU\n" in output


def test_an_old_package_and_a_missing_one_are_problems(monkeypatch) -> None:
    assert check_package("torch", "2.10") == Finding("torch", "ok", importlib.metadata.version("torch"))
    absent = check_package("no-such-package-here", "1.0")
    assert (absent.status, absent.remedy) == ("problem", 'pip install "no-such-package-here>=1.0"')
    monkeypatch.setattr(checkup, "version", lambda name: "2.9.1+cu126")
    old = check_package("torch", "2.10")
    assert (old.status, old.text) == ("problem", "2.9.1+cu126 is older than 2.10")
    assert check_package("torch", "2.9").status == "ok"


def test_versions_are_compared_as_numbers() -> None:
    assert release("2.10.0+cu128") == (2, 10, 0)
    assert release("3.8.0rc1") == (3, 8, 0)
    assert release("0.9") < release("0.10") < release("1")


def test_what_is_checked_is_what_the_package_requires() -> None:
    wanted = {finding.name for finding in check_packages()}
    assert {"torch", "tokenizers", "safetensors", "bitsandbytes", "jinja2"} <= wanted
    assert not wanted & {"pytest", "wandb", "pyarrow"}


def test_without_torch_the_rest_is_still_said(monkeypatch, capsys) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr(checkup, "version", version)
    found = findings(capsys, status=1)
    assert found["torch"].remedy == 'pip install "torch>=2.10"'
    assert "GPU" not in found
    assert "Hub token" in found
    assert main(["doctor"]) == 1
    assert "found a problem: torch\n" in capsys.readouterr().out


def test_a_torch_that_cannot_be_imported_is_a_problem(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "slothcore.commands.gpu_checkup", None)
    found = findings(capsys, status=1)
    assert found["torch build"].text.startswith("torch cannot be imported: ")


def test_the_token_is_said_to_be_there_and_not_shown(monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert [finding.text for finding in check_hub()][1].startswith("present")
    main(["doctor"])
    assert "verysecret" not in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in [finding.text for finding in check_hub()][1]


def test_disks(tmp_path, monkeypatch) -> None:
    assert check_disk("disk", tmp_path / "not" / "made" / "yet").status in ("ok", "warning")
    monkeypatch.setattr(checkup, "LITTLE_DISK", 2**60)
    assert check_disk("disk", tmp_path).status == "warning"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert check_disk("disk", tmp_path).status == "problem"


def test_a_kernel_that_fails_is_a_problem_and_the_report_goes_on(monkeypatch) -> None:
    """On a machine that seems to have a GPU, but whose kernels do not run."""

    def fail(device: torch.device) -> str:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15 * 2**30, 16 * 2**30))
    monkeypatch.setattr(gpu_checkup, "run_kernels", fail)
    monkeypatch.setattr(gpu_checkup, "run_8bit_update", fail)
    found = {finding.name: finding for finding in examine_gpu()}
    assert found["kernels"].status == found["8-bit AdamW"].status == "problem"
    assert found["kernels"].text == "failed: RuntimeError: no kernel image is available"
    assert found["8-bit AdamW"].remedy == "pip install --upgrade bitsandbytes"
    assert found["GPU"].status == "ok"
    assert "15.0 of 16.0 GiB free; 2 GPUs, of which one trains; without bfloat16" in found["GPU"].text
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert {finding.name: finding for finding in examine_gpu()}["GPU"].status == "problem"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    warned = {finding.name: finding for finding in examine_gpu()}["GPU"]
    assert (warned.status, warned.remedy) == ("warning", "nvidia-smi shows which")


def test_the_kernels_run_here(kernel_device) -> None:
    """On a CPU in Triton's interpreter."""
    assert "agree with plain torch" in run_kernels(torch.device(kernel_device))


def test_a_wrong_kernel_is_seen(kernel_device, monkeypatch) -> None:
    monkeypatch.setattr("slothcore.kernels.rms_norm.rms_norm_forward", lambda x, weight, *, eps: (x, None))
    with pytest.raises(ValueError, match="away from plain torch"):
        run_kernels(torch.device(kernel_device))


@pytest.mark.gpu
def test_all_checks_pass_on_a_gpu() -> None:
    assert run_8bit_update(torch.device("cuda")) == "bitsandbytes' update ran"
    found = {finding.name: finding for finding in examine_gpu()}
    assert {found[name].status for name in ("driver", "kernels", "8-bit AdamW", "training on")} == {"ok"}
    assert found["training on"].text == torch.cuda.get_device_name()
