"""Sessions: tests (default), floors, slow, gpu, lint, types, quickstart, benchmarks, docs, build."""

import shutil

import nox

nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True

ENV = {
    "PYTHONDONTWRITEBYTECODE": "",  # compiled modules start in a third of the time
    "WANDB_MODE": "offline",
}
TEST_ENV = {**ENV, "OMP_NUM_THREADS": "1"}  # small models; two test processes share the cores

TWO = ("-n", "2", "--dist", "worksteal")  # processes; neighbours stay together, as they share fixtures


def install(session: nox.Session, *extras: str) -> None:
    session.install(f".[{','.join(extras)}]" if extras else ".")


@nox.session
def tests(session: nox.Session) -> None:
    """The default suite; arguments go to pytest."""
    install(session, "dev")
    session.run("pytest", *TWO, *session.posargs, env=TEST_ENV)


@nox.session(venv_backend="uv", python=["3.11", "3.12", "3.13"])
def floors(session: nox.Session) -> None:
    """The default suite, less exports, on the oldest versions that pyproject.toml allows; arguments go to pytest."""
    session.install("--resolution", "lowest-direct", ".[tests]")
    session.run("pytest", *TWO, *session.posargs, env=TEST_ENV)


@nox.session
def slow(session: nox.Session) -> None:
    """What the default suite leaves out: real-size encoders, long runs, real images (FPT_CHEST_XRAY and FPT_FUNDUS)."""
    install(session, "dev")
    session.run("pytest", "-m", "slow", "--timeout", "3600", *session.posargs, env=ENV)


@nox.session
def lint(session: nox.Session) -> None:
    session.install("ruff>=0.9")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    install(session, "dev")
    session.run("mypy", env=ENV)


@nox.session
def quickstart(session: nox.Session) -> None:
    """The README's main command, in a folder of its own."""
    install(session)
    shutil.rmtree("runs/quickstart", ignore_errors=True)
    session.run("fpt-lightning", "fit", "--config", "examples/quickstart.yaml", env=ENV)


@nox.session
def gpu(session: nox.Session) -> None:
    """Everything that a CPU cannot prove, in half an hour; arguments go to benchmarks/gpu_check.py."""
    install(session, "dev")
    session.run("python", "benchmarks/gpu_check.py", "--out", "runs/gpu_check", *session.posargs, env=ENV)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """The benchmarks that need no data of your own (40 minutes); they write their results beside themselves."""
    install(session, "dev")
    session.run("python", "benchmarks/quickstart.py", env=ENV)
    session.run("python", "benchmarks/memory_by_resolution.py", *session.posargs, env=ENV)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in site/; a warning is an error."""
    install(session, "docs")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={**ENV, "NO_MKDOCS_2_WARNING": "1"})


@nox.session
def build(session: nox.Session) -> None:
    session.install("build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", "dist/*")
