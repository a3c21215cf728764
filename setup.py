"""Packaging of msa_openclip: metadata, dependency bounds with their reasons, extras and entry points."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

INSTALL_REQUIRES = [
    # What the plugin extends is there from 3.3 on, and in 4.x (plugin/host_3.py, plugin/host_4.py).
    "open_clip_torch>=3.3.0,<5",
    # 2.5 is the first torch that loads the `torch.backends` entry point by which the plugin activates itself;
    # open_clip 4.x asks for 2.6 itself.
    "torch>=2.5",
    # feature_info and forward_intermediates with NLC output of every backbone used here.
    "timm>=1.0.17",
    # What open_clip_train imports, so that `pip install msa_openclip` is enough to train (bounds of its extra).
    "webdataset>=0.2.86,<=0.2.86",
    "transformers[sentencepiece]>=4.40",
    "pandas>=2.0",
    "braceexpand>=0.1.7",
    "fsspec>=2024.2",
    "pillow>=9.3",  # Image.Resampling and Image.Transpose enums (9.1); the first with wheels for Python 3.11
    "numpy>=1.24",
    # Templates of pages and model cards; no extra, because torch requires it anyway. 3.1 has required blocks.
    "jinja2>=3.1",
    # Metadata of model cards. open_clip requires it without a bound; transformers 4.40 takes none below 0.19.3.
    "huggingface_hub>=0.19.3",
    "tqdm>=4.60",
    "pyarrow>=15",  # metadata of indexes is GeoParquet; 15 is the first that writes float16 to Parquet
]

EXTRAS = {
    "plot": ["matplotlib>=3.7"],  # figures and HTML pages
    "search": ["faiss-cpu>=1.8"],  # indexes of 100,000 images and more
    "demo": ["starlette>=0.40", "uvicorn>=0.30"],  # the map; Leaflet comes with this package
    "report": ["imagehash>=4.3", "matplotlib>=3.7"],  # perceptual duplicates in `shards info`
    "geo": ["rasterio>=1.3", "shapely>=2.0"],  # GeoTIFF: bands, stretch, tiles, coordinates; their outlines in indexes
    "stac": ["pystac>=1.8", "rasterio>=1.3", "shapely>=2.0"],  # scenes of STAC catalogues
    "archive": ["shapely>=2.0", "duckdb>=1.1"],  # outlines on Earth and filter expressions of indexes
    "lancedb": ["lancedb>=0.40"],  # indexes as its tables; `create_index(config=...)` of the docs is younger than 0.30
    "parquet": ["pyarrow>=15"],  # kept for who names it; pyarrow is there anyway
    "hf": ["datasets>=2.18"],  # Hugging Face data sets on disk as captions
    "s3": ["s3fs>=2024.2"],
    "ray": ["ray>=2.9"],  # builds on a cluster
    "test": [
        "pytest>=8",
        "pytest-timeout>=2.2",
        "pytest-xdist>=3.5",  # the suite on two cores
        "hypothesis>=6.100",
        "moto[server]>=5",  # the local S3 server of the tests
        "aiohttp>=3.9",
        "playwright>=1.40",  # drives the browser of the demo's test, which is the system's chromium
        "psycopg[binary]>=3.1",  # the examples of docs/how-to/databases.md
        "pgvector>=0.3",
        "qdrant-client>=1.16",  # the first with metadata of collections
        "clip-benchmark>=1.6",  # the independent evaluator that ours is compared with
    ],
    # Pinned: the site is built with warnings as errors, and a release may warn of something new. Python 3.11 or later.
    "docs": ["mkdocs==1.6.1", "mkdocs-material==9.8.2", "mkdocstrings==1.0.8", "mkdocstrings-python==2.0.11"],
    # One pinned linter for hook and CI; the type checker likewise.
    "dev": ["ruff==0.17.5", "mypy==2.4.1", "build>=1.0", "pre-commit>=4"],
}
USER_EXTRAS = [extra for name, extra in EXTRAS.items() if name not in ("test", "docs", "dev")]
EXTRAS["all"] = sorted({requirement for extra in USER_EXTRAS for requirement in extra})

setup(
    name="msa_openclip",
    version="0.1.0",
    description="Multi-scale alignment (MSA) for remote sensing image-text retrieval, as a plugin for open_clip",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["msa_openclip", "msa_openclip.*"]),
        # The user's top level: these two lie beside the package and are installed inside it.
        *(f"msa_openclip.{name}" for name in find_packages(include=["model_configs", "shards", "shards.*"])),
    ],
    package_dir={
        "msa_openclip": "msa_openclip",
        "msa_openclip.model_configs": "model_configs",
        "msa_openclip.shards": "shards",
    },
    package_data={
        "msa_openclip": ["py.typed"],
        "msa_openclip.demo": ["page/*", "page/leaflet/*", "page/leaflet/images/*"],
        "msa_openclip.model_configs": ["*.json"],
        "msa_openclip.reports": ["templates/*"],
        "msa_openclip.shards.pages": ["*.html", "*.css"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        # torch calls every entry point of this group at the end of `import torch`.
        "torch.backends": ["msa_openclip = msa_openclip.autoload:activate"],
        "console_scripts": ["msa-openclip = msa_openclip.commands.main:main"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
