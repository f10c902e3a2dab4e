"""Every command and code block of README.md and docs/ runs, at a small size: a page is a test, in a folder of its own.

The blocks of the pages in ``LONG`` run with ``-m slow`` alone; else their commands are parsed.

- ``bash``: ``fpt-lightning`` and ``python`` commands run in the order of the page; of others, names are checked.
- ``python`` runs; with a ``title``, it is a file that later commands may use. ``yaml`` and ``csv`` with a title are
  files too, and every YAML is parsed by the command line.
- ``text`` is output. After ``<!-- fails -->``, the command must fail with that text, where ``...`` stands for anything.
- After ``<!-- not run: why -->``, commands are parsed alone.

Encoders become ``test_vit``, and resolutions, epochs and the like small, where a page has those of real use.
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import yaml

from fpt_lightning.cli import main
from fpt_lightning.datamodules.synthetic import write_fundus_images
from fpt_lightning.encoder.config import EncoderConfig, encoder_shape
from fpt_lightning.encoder.frozen import build_encoder
from fpt_lightning.encoder.weights import load_weights
from fpt_lightning.methods import METHODS
from fpt_lightning.planning import planner
from fpt_lightning.store.codecs import CODECS
from miniatures import build, write_dicom
from small import ROOT, write_images

PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
LONG = ("data", "deployment", "memory", "methods", "pictures")
"""Pages of docs/ that take long, whose commands other tests have too."""
SMALL: dict[str, Any] = {
    "encoder": "test_vit",
    "resolution": 64,
    "side_resolution": 32,
    "image_size": 48,
    "max_epochs": 1,
    "batch_size": 8,
    "count": 24,
    "size": 320,
    "num_workers": 0,
    "folds": 3,
}
CHANGED_OPTIONS = ("encoder", "side_resolution", "max_epochs", "num_workers", "folds")  # where a command line has them
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>fails|not run: [^\n]+) -->\n)?"
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INDENTED = re.compile(r"(?:^ {4}[^\n]*\n|^\n(?= {4}))+", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    title: str = ""
    mark: str = ""


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, in order; those that the README indents are commands."""
    text = (ROOT / page).read_text()
    found = [
        (m.start(), Block(m["language"], m["body"], m["title"] or "", m["mark"] or "")) for m in BLOCK.finditer(text)
    ]
    outside = BLOCK.sub(lambda m: re.sub(r"[^\n]", "-", m[0]), text)
    for match in INDENTED.finditer(outside) if page == "README.md" else ():
        found.append((match.start(), Block("bash", re.sub("^ {4}", "", match[0], flags=re.MULTILINE))))
    return [block for _, block in sorted(found, key=lambda pair: pair[0])]


def commands(body: str) -> list[list[str]]:
    """The commands of a shell block, each as its words."""
    lines = [line for line in body.replace("\\\n", " ").splitlines() if not line.startswith("#!")]
    split = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [words for words in split if words]


def small(content: Any) -> Any:
    """A configuration at a small size."""
    if not isinstance(content, dict):
        return content
    made = {key: SMALL.get(key, small(value)) for key, value in content.items()}
    if "encoder" in content:
        made |= {"pretrained": False}
    if content.get("class_path") in ("FPTModule", "FPTPlusModule"):
        made["init_args"] |= {"side_resolution": 32}
    if "root" in content:
        made |= {"image_size": 48, "batch_size": 8}
    if "default_root_dir" in content:
        made |= {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": None}
    return made


def small_words(words: list[str]) -> list[str]:
    made = list(words)
    for i, word in enumerate(words[:-1]):
        name = word.rpartition(".")[2]
        if word.startswith("--") and name in CHANGED_OPTIONS and not words[i + 1].startswith(("swin", "vit_mine")):
            made[i + 1] = str(SMALL[name])
    if "auto" in made:  # FPT+ among others, of which a configuration may say nothing
        made += ["--model.side_resolution", "32"]
    return made


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: examples at a small size, and small data sets."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for path in (folder / "examples").glob("*.yaml"):
        if path.name != "sweep.yaml":
            path.write_text(yaml.safe_dump(small(yaml.safe_load(path.read_text()))))
    (mine,) = [block for block in blocks("docs/index.md") if block.title == "mine.yaml"]
    (folder / "mine.yaml").write_text(yaml.safe_dump(small(yaml.safe_load(mine.body))))
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    write_fundus_images(folder / "runs/quickstart-data/images", SMALL["count"], size=SMALL["size"])
    write_images(folder / "data/mine", {"a": 10, "b": 10, "c": 10})
    write_images(folder / "new_images", {"some": 2}, seed=3)
    build("ddr", folder / "data/DDR")
    build("isic2018", folder / "data/ISIC2018")
    chest = write_images(folder / "data/chest", {"x": 12, "y": 12, "z": 12})
    marks = {"x": "1,0,-1", "y": "0,1,", "z": ",,1"}
    rows = [
        f"{p.parent.name}/{p.name},{p.parent.name}{p.stem},{marks[p.parent.name]}" for p in sorted(chest.rglob("*.png"))
    ]
    (chest / "labels.csv").write_text("\n".join(["image,patient,edema,effusion,pneumothorax", *rows]))
    ages = write_images(folder / "data/ages", {"all": 40})
    (ages / "ages.csv").write_text("\n".join(["image,age", *(f"all/{i:03d}.png,{30 + i}" for i in range(40))]))
    grades = ("no DR", "mild NPDR", "moderate NPDR", "severe NPDR", "PDR")
    other = write_images(folder / "data/OtherHospital", {"a": 4, "b": 4}, seed=5)
    (other / "elsewhere.csv").write_text(
        "image,label\n" + "".join(f"{n}/{i:03d}.png,{n}\n" for n in "ab" for i in range(4))
    )
    (other / "other.csv").write_text("image,label\n" + "".join(f"a/{i:03d}.png,{grades[i]}\n" for i in range(4)))
    clinic = write_images(folder / "data/clinic", {"pictures": 40}) / "pictures"
    for i, path in enumerate(sorted(clinic.iterdir())):
        path.rename(clinic / f"p{i:02d}_1_{('healthy', 'ill')[i % 2]}.png")
    (folder / "data/scans").mkdir()
    for seed, name in enumerate(("one", "two", "three", "four")):
        write_dicom(folder / f"data/scans/{name}.dcm", f"p{seed}", "L", seed)
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(30, generator=generator)
        (folder / "runs" / name).mkdir(parents=True)
        lines = [
            f"{i:02d}.png,{'xy'[i % 2]},{1 - p:.3f},{p:.3f}" for i, p in enumerate((scores + torch.arange(30) % 2) / 2)
        ]
        (folder / f"runs/{name}/predictions.csv").write_text("\n".join(["path,label,prob_x,prob_y", *lines, ""]))
    shutil.copy(folder / "runs/a/predictions.csv", folder / "predictions.csv")
    shutil.copy(folder / "runs/b/predictions.csv", folder / "val.csv")
    (folder / "weights").mkdir()
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "page"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(planner, "LARGEST_BATCH", 16)  # what is looked for
    monkeypatch.setattr(planner, "LARGEST_RESOLUTION", 128)
    monkeypatch.setattr("fpt_lightning.cli.auto.CANDIDATES", ("query_tokens", "fpt_plus"))  # four take a minute
    monkeypatch.setattr("fpt_lightning.cli.auto.FACTORS", (1,))
    monkeypatch.setattr("fpt_lightning.cli.trainer.METHODS", {name: METHODS[name] for name in ("linear", "fpt_plus")})
    known = set(sys.modules)
    with mock.patch.dict(CODECS):  # a page adds one
        yield folder
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def run(words: list[str]) -> None:
    """A command of a page. README.md tells of alternatives: a run or a store is made where a command lacks one."""
    while "=" in words[0] and not words[0].startswith("-"):
        assert words[0] == "PYTHONPATH=.", words
        words = words[1:]
    program, *rest = words
    if program == "fpt-lightning":
        rest = small_words(rest)
        if rest[0] == "fit" and "examples/ddr.yaml" in rest and "--print_config" not in rest:
            shutil.rmtree("runs/ddr", ignore_errors=True)
        if rest[0] == "plan" and "examples/ddr.yaml" in rest and not Path("data/DDR/manifest.csv").exists():
            main(["datasets", "prepare", "ddr", "data/DDR"])
        if rest[0] == "test" and "--data.external" in rest and not Path("features/other.zarr").exists():
            main(["preload", *rest[1:]])
        if "--print_config" in rest:
            parsed(*rest)
        else:
            main(rest)
        if rest[0] == "init":
            path = Path("my.yaml")
            path.write_text(yaml.safe_dump(small(yaml.safe_load(path.read_text()))))
    elif program == "python" and rest[0].startswith("benchmarks/"):
        assert script([rest[0], "--help"]) == 0
    elif program == "python":
        extra = ["--count", "24", "--epochs", "1"] if rest[0] == "examples/embed_in_your_project.py" else []
        assert script([*small_words(rest), *extra]) == 0
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert rest[0] == "install"
        assert all(found in extras for word in rest for found in re.findall(r"\[(\w+)\]", word))
    elif program == "nox":
        assert f"def {rest[1]}(" in (ROOT / "noxfile.py").read_text()
    else:
        raise AssertionError(f"{program} is not known here: mark the block as not run, and say why.")


def script(words: list[str]) -> object:
    """The exit status of a Python script, run in this process: PyTorch is imported already."""
    with mock.patch.object(sys, "argv", words), mock.patch.object(sys, "path", [str(Path(words[0]).parent), *sys.path]):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stopped:
            return stopped.code or 0
    return 0


BENCHMARKS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_that_is_asked_for_help_runs_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out


def parse(words: list[str]) -> None:
    """The ``fpt-lightning`` within a command that is not run."""
    joined = " ".join(map(shlex.quote, words)).replace("-m fpt_lightning", "fpt-lightning")
    _, found, rest = joined.partition("fpt-lightning ")
    if found:
        parsed(*shlex.split(rest))


def parsed(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*(word for word in arguments if word != "--print_config"), "--print_config"])
    assert not stopped.value.code


def run_block(block: Block, output: str, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a block whose output is said to be ``output``, in the page's folder."""
    body = block.body
    if block.title.endswith((".py", ".csv", ".yaml")):
        path = Path(block.title)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(small(yaml.safe_load(body))) if block.language == "yaml" else body)
    if block.language == "yaml":
        (page / "block.yaml").write_text(body)  # as it is written
        base = [] if {"model", "data"} <= set(yaml.safe_load(body)) else ["--config", str(ROOT / "examples/ddr.yaml")]
        parsed("fit", *base, "--config", str(page / "block.yaml"))
    elif block.language == "python":
        if not block.title:
            (page / "block.py").write_text(
                re.sub(r'encoder="vit_base[^"]*"', 'encoder="test_vit", pretrained=False, side_resolution=32', body)
                .replace("resolution=512", "resolution=64")
                .replace("max_epochs=20", "max_epochs=1")
                .replace("features/ddr", "features/python")
            )
        if "__main__" not in body:
            capsys.readouterr()
            runpy.run_path(block.title or "block.py", run_name="block")
            said = capsys.readouterr().out
            assert output in said
    elif block.language == "bash" and block.mark.startswith("not run"):
        subprocess.run(["bash", "-n"], input=body, text=True, check=True)
        for words in commands(body):
            parse(words)
    elif block.language == "bash" and block.mark == "fails":
        (words,) = commands(body)
        with pytest.raises(SystemExit) as stopped:
            run(words)
        assert stopped.value.code == 2
        said = " ".join(capsys.readouterr().err.split("fpt-lightning: ", 1)[-1].split())
        pattern = ".*".join(re.escape(" ".join(part.split())) for part in output.split("..."))
        assert re.match(pattern, said), said
    elif block.language == "bash":
        for words in commands(body):
            run(words)
    else:
        assert block.language in ("text", "csv"), block.language


def run_page(page: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(page)
    for i, block in enumerate(found):
        following = found[i + 1] if i + 1 < len(found) else None
        output = following.body if following is not None and following.language == "text" else ""
        run_block(block, output, workspace, capsys)


@pytest.mark.parametrize("page", [page for page in PAGES if Path(page).stem not in ("encoders", *LONG)])
def test_every_block_of_a_page_runs(
    page: str, workspace: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if page != "docs/index.md":
        request.getfixturevalue("few_figures")
    run_page(page, workspace, capsys)


@pytest.mark.parametrize("page", LONG)
def test_every_command_of_a_long_page_is_parsed(page: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("mine.yaml", "my.yaml")  # which ``init`` would write
    for block in blocks(f"docs/{page}.md"):
        if block.language == "python":
            compile(block.body, page, "exec")
        elif block.language == "bash":
            for words in commands(block.body):
                parse(words)
        else:
            run_block(block, "", workspace, capsys)


# Encoders


def configurations() -> dict[str, dict[str, Any]]:
    """The YAML blocks of the page on encoders, by title."""
    return {b.title: yaml.safe_load(b.body) for b in blocks("docs/encoders.md") if b.language == "yaml"}


@pytest.mark.parametrize("title", sorted(configurations()))
def test_every_encoder_is_built_and_fits_its_resolutions(title: str, tmp_path: Path) -> None:
    content = configurations()[title]
    model, data = content["model"]["init_args"], content["data"]["init_args"]
    path = tmp_path / title
    path.write_text(yaml.safe_dump(content))
    parsed("fit", "--config", str(path))
    shape = encoder_shape(model["encoder"])
    assert shape.tokens((data["resolution"], data["resolution"])) > 1000
    assert model.get("side_resolution", 128) % shape.patch_size[0] == 0
    if "pretrained" not in model:
        assert model["encoder"] in timm.list_pretrained()


def test_the_encoder_check_prints_what_the_page_says(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks("docs/encoders.md")
    (at,) = [i for i, block in enumerate(found) if block.language == "python" and not block.title]
    run_block(found[at], found[at + 1].body, workspace, capsys)


def test_a_clip_file_gives_its_image_tower(tmp_path: Path) -> None:
    """In the layout of BiomedCLIP: timm's image tower and a text tower with more tensors than it."""
    vit = timm.create_model("test_vit", num_classes=0)
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in vit.state_dict().items()}
    tensors |= {f"text.transformer.encoder.layer.{i}.weight": torch.zeros(2) for i in range(200)}
    tensors |= {"visual.head.proj.weight": torch.zeros(8, 64), "logit_scale": torch.tensor(1.0)}
    torch.save(tensors, tmp_path / "open_clip_pytorch_model.bin")
    model = build_encoder(EncoderConfig("test_vit", pretrained=False), (96, 160))
    load_weights(model, tmp_path / "open_clip_pytorch_model.bin")
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], vit.state_dict()["blocks.0.attn.qkv.weight"])


# What takes longer, or other processes


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG)
def test_every_block_of_a_long_page_runs(page: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if page == "deployment":
        pytest.importorskip("onnx", reason="comes with a torch that exports")
    run_page(f"docs/{page}.md", workspace, capsys)


@pytest.mark.slow
def test_the_plan_of_the_page_is_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = blocks("docs/memory.md")
    (at,) = [i for i, block in enumerate(found) if block.language == "bash"][:1]
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):  # the images are not there
        main(commands(found[at].body)[0][1:])
    assert found[at + 1].body in capsys.readouterr().out


@pytest.mark.slow
def test_torchrun_on_two_processes(workspace: Path) -> None:
    (block,) = [block for block in blocks("docs/devices.md") if block.body.startswith("torchrun --nproc_per_node 2")]
    (words,) = commands(block.body)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words[1:]], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (workspace / "runs/quickstart/report.html").is_file()
