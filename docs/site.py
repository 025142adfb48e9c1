"""A hook of mkdocs: the pages of the project as pages of the site, and a reference of its public names."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
REFERENCE = {
    "method": (
        "The method",
        [
            "module.SimCLR",
            "byol",
            "supervised",
            "augment.SimCLRAugmentation",
            "losses",
            "heads.ProjectionHead",
            "encoders",
            "optim",
        ],
    ),
    "data": (
        "Images",
        [
            "data.ImageData",
            "data.labelled",
            "data.module.default_batch_size",
            "data.decode",
            "data.rules",
            "data.splits",
            "inputs",
        ],
    ),
    "eval": (
        "Evaluation",
        [
            "eval.features",
            "eval.protocol",
            "eval.knn",
            "eval.logreg",
            "eval.linear",
            "eval.metrics",
            "eval.quality",
            "eval.predictions",
            "eval.evaluation",
            "eval.heads",
            "eval.few_labels",
            "eval.finetune",
            "eval.distill",
            "eval.training",
            "eval.feature_cache",
            "eval.suite",
            "eval.transfer",
            "eval.supervised",
            "eval.tables",
            "eval.verify",
        ],
    ),
    "training": (
        "Training",
        [
            "training.method",
            "training.hooks",
            "training.views",
            "training.objective",
            "training.gradient_cache",
            "seeding",
            "distributed",
            "precision",
        ],
    ),
    "use": (
        "Using an encoder",
        ["use.source", "use.embed", "use.embedded", "use.tables", "use.search", "use.alike", "use.classify"],
    ),
    "run": (
        "A run",
        [
            *(
                "checkpoint",
                "starting_weights",
                "export.formats",
                "pyramid",
                "online_accuracy",
                "online_quality",
                "step_figures",
            ),
            *("dashboard.Dashboard", "loggers", "wandb_run", "diagnosis"),
            *("nonfinite.watch", "nonfinite.dump", "nonfinite.replay", "report", "compare.rows", "profile"),
            *("ablate.experiment", "ablate.cells", "ablate.verdict", "efficientnet"),
        ],
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/ and what is made of docstrings."""
    for uri, source in PAGES.items():
        files.append(File.generated(config, uri, content=_with_links_of_the_site((ROOT / source).read_text(), source)))
    for name, (title, modules) in REFERENCE.items():
        text = f"# {title}\n\n" + "\n\n".join(f"::: simclr.{module}" for module in modules)
        files.append(File.generated(config, f"reference/{name}.md", content=text + "\n"))
    return files


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """The pages that lie in docs/ link to those outside of it."""
    return _with_links_of_the_site(markdown, f"docs/{kwargs['page'].file.src_uri}")


def _with_links_of_the_site(text: str, source: str) -> str:
    """Links between files of the repository as links between pages; of those to files without a page, the words."""
    pages = {(ROOT / path).resolve(): uri for uri, path in PAGES.items()}
    docs = ROOT / "docs"
    pages |= {path.resolve(): path.relative_to(docs).as_posix() for path in docs.rglob("*") if path.suffix != ".py"}

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if "://" in target or target.startswith("#") or target in pages.values():
            return match[0]
        uri = pages.get((ROOT / source).parent.joinpath(target).resolve())
        return words if uri is None else f"[{words}]({uri})"

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)
