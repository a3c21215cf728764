"""Fixtures of all tests: no network, warnings are errors, tiny models known to open_clip here and in subprocesses."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import processes, tiny

os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="msa-openclip-tests-")  # where models are remembered

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch.compile does in some tests

import msa_openclip  # noqa: F401  # active also where torch's entry points are off

THIRD_PARTY_WARNINGS = (
    "ignore:.*deprecated.*:DeprecationWarning:(?!msa_openclip)",
    "ignore::DeprecationWarning:importlib",  # SWIG types of sentencepiece
    "ignore:Importing from timm.models.helpers is deprecated:FutureWarning",  # open_clip 4.2 does
    "ignore:unclosed file:ResourceWarning",  # open_clip_train and webdataset leave files to the garbage collector
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random BERT and its tokenizer."""
    return tiny.write_bert(tmp_path_factory.mktemp("hub") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_configs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """Folder of model configurations, registered in this process; MSA_OPENCLIP_CONFIGS=folder registers it elsewhere.

    tiny-ViT, tiny-RN are plain CLIP models, MSA-tiny-ViT, MSA-tiny-RN the same towers with MSA; MSA-tiny-BERT is the
    paper's kind: timm ResNet, BERT, preset "paper".
    """
    import open_clip

    directory = tmp_path_factory.mktemp("configs")
    for kind in ("ViT", "RN"):
        tiny.write_config(directory, f"tiny-{kind}", tiny.config(kind))
        tiny.write_config(directory, f"MSA-tiny-{kind}", tiny.config(kind, msa={}))
    paper = {"preset": "paper", "heads": 4}
    tiny.write_config(directory, "MSA-tiny-BERT", tiny.config("timm-RN", text=tiny.bert_text(tiny_bert), msa=paper))
    open_clip.add_model_config(directory)
    return directory


@pytest.fixture
def run_python(tiny_configs: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a fresh process that knows the tiny models, to its end; an error there fails the test."""

    def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(tiny_configs), **environment}
        done = processes.run_new_python("-c", code, *arguments, env=env)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on an S3 server of this machine, reached by real HTTP requests."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] (extra test) is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs (extra s3) is not installed")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{uuid.uuid4().hex}"  # the server keeps its state for as long as this process lives
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
