"""One rule for hints: whatever was typed that does not exist here gets the line that says what to type.

The tables hold what people bring from other programs (lightly, lightly-train, solo-learn, timm, Lightning). A hint is
the options to type: {x} in it stands for the value that was given, or x where there is none that fits. What begins
otherwise is said as it stands. tests/test_hints.py parses every option named here: a hint never leads to a refusal.
"""

import difflib
import re
from collections.abc import Collection
from pathlib import Path

_NAMED_SETS = ("cifar10", "cifar100", "stl10", "imagenet", "shapes")
_FOLDER = "data train root path folder dir images img_dir image_dir image_folder images_dir train_path train_data input"
_FOLDER += " input_dir data_path data_folder dataset_path dataset_dir traindir train_folder imgs"
_TEST = "test val test_path val_path val_dir valdir eval_dir validation_dir val_data test_data test_folder val_folder"
_RUN = "run ckpt checkpoint_path model_path weights pretrained pretrained_weights resume load load_from"
_RUN += " encoder_path resume_from from_checkpoint init_from model encoder backbone arch pretrained_feature_extractor"
_OUT = "out output output_dir out_dir outdir save_dir save_path log_dir logdir exp_dir experiment_dir work_dir"
_OUT += " results_dir o checkpoint_dir dirpath default_root_dir"
_GPU = "gpu gpus cuda use_cuda use_gpu accelerator n_gpus num_gpus devices"
_CPU = "no_cuda no_gpu cpu disable_cuda use_cpu"
_WORKERS = "num_workers nw j n_workers dataloader_workers num_threads threads"
_CONFIG = "cfg conf config_file config_path config_name yaml recipe"

_TRAIN = {
    "epochs num_epochs n_epochs nepochs total_epochs num_train_epochs e ep": "--trainer.max_epochs {100}",
    "steps num_steps total_steps max_iter iterations iters num_iterations": "--trainer.max_steps {1000}",
    "batch_size batch bs bsz b train_batch_size global_batch_size": "--data.batch_size {256}",
    "batch_size_per_device per_device_batch_size batch_size_per_gpu per_gpu_batch_size per_device_train_batch_size": (
        "--data.batch_size 256, the batch of all devices together."
    ),
    "accum_iter accumulate accumulation_steps grad_accum grad_accum_steps gradient_accumulation_steps": (
        "--trainer.accumulate_grad_batches {2}"
    ),
    "lr learning_rate base_learning_rate blr max_lr": "--model.base_lr {1.0}",
    "min_lr lr_end eta_min final_lr": "Leave it out: the learning rate ends at 0.",
    "sched scheduler lr_schedule lr_scheduler": "Leave it out: it is warm-up and half a cosine.",
    "wd weightdecay decay l2": "--model.weight_decay {0.0001}",
    "opt optim optimizer_name": "--model.optimizer {lars}",
    "lars use_lars": "--model.optimizer lars",
    "warmup warmup_epoch num_warmup_epochs": "--model.warmup_epochs {10}",
    "warmup_steps warmup_iters warmup_ratio": "--model.warmup_epochs 10",
    "tau temp t": "--model.temperature {0.2}",
    "proj_dim proj_output_dim out_dim output_dim z_dim embed_dim embedding_dim projector_dim feature_dim": (
        "--model.projection_dim {128}"
    ),
    "proj_hidden_dim hidden mlp_dim": "--model.hidden_dim {512}",
    "img_size imgsize image_sz imsize size input_size resolution crop_size": "--model.image_size {32}",
    "model arch a backbone network net architecture model_name encoder_name": "--model.encoder {resnet18}",
    "compound_coef compound_coefficient scaling_coefficient": "--model.encoder efficientnet --model.phi {0}",
    "width_mult width_multiplier width_coefficient widen_factor": "--model.width {2.0}",
    "depth_mult depth_multiplier depth_coefficient": "--model.depth {2.0}",
    "pretrained weights init_from pretrained_weights": "Leave it out: an encoder begins from random weights.",
    "gpus num_gpus n_gpus ngpus ngpu world_size nproc_per_node num_devices": "--trainer.devices {1}",
    "nodes nnodes": "--trainer.num_nodes {1}",
    "gpu cuda use_cuda use_gpu device": "--trainer.accelerator {gpu}",
    _CPU: "--trainer.accelerator cpu",
    "amp use_amp mixed_precision bf16 bfloat16 use_bf16": "--trainer.precision bf16-mixed",
    "fp16 half use_fp16 float16": "--trainer.precision 16-mixed",
    "fp32 float32 full_precision": "--trainer.precision 32-true",
    "precision dtype": "--trainer.precision {32-true}",
    "distributed ddp dist multiprocessing_distributed launcher": "--trainer.strategy ddp --trainer.devices 2",
    "dist_backend dist_url local_rank rank": "Leave it out: --trainer.devices 2 starts the ranks.",
    "sync_bn syncbn use_syncbn": "--trainer.sync_batchnorm true",
    _WORKERS: "--data.workers {4}",
    _FOLDER: "--data.train_dir {photos}",
    "data_dir datadir data_root": (
        "Use --data.train_dir {photos} for a folder of images, --data.source cifar10 --data.data_dir {sets} for a set."
    ),
    _TEST: "--data.test_dir {photos/test}",
    "val_split test_split validation_split": "--data.holdout {0.2}",
    "heldout hold_out val_fraction val_size": "--data.held_out {0.02}",
    "dataset data_set dataset_name ds source": "--data.source {cifar10} --data.data_dir datasets",
    "cache cache_images": "--data.cache_dir cache",
    "ckpt checkpoint_path resume_path resume_from resume_from_checkpoint continue load load_from "
    "restore r": "--ckpt_path {runs/NAME/checkpoints/last.ckpt}",
    _OUT: "--run_dir {runs/first}",
    "name exp_name experiment experiment_name run_name": "--run_dir runs/{first}",
    "seed random_seed manual_seed rng_seed": "--seed_everything {0}",
    "use_wandb log_wandb wandb_mode": "--wandb auto",
    "no_wandb": "Leave it out: Weights & Biases is used only on request.",
    "offline": "--wandb offline",
    "project wandb_project_name": "--wandb_project {simclr}",
    "tensorboard use_tensorboard": "Leave it out: TensorBoard logs are always written.",
    "knn_k": "--knn.k {20}",
    "knn_freq eval_every eval_freq val_freq knn_every eval_interval": "--knn.every_n_epochs {5}",
    "log_every log_interval log_freq print_freq log_every_n log_step": "--trainer.log_every_n_steps {25}",
    "save_freq save_every checkpoint_every save_interval": "Leave it out: a checkpoint is kept after every epoch.",
    "compile torch_compile torchcompile": "--model.compile_encoder true",
    "n_views num_views n_crops num_crops num_large_crops": "--model.views {2}",
    "num_small_crops n_small_crops local_crops_number n_local_crops num_local_crops n_local_views": (
        "--model.small_crops {4}"
    ),
    "small_crops_size local_crop_size local_crops_size": "--model.small_crop_size {16}",
    "small_crops_scale local_crop_scale local_crops_scale": "--model.small_crop_scale [{0.05},0.2]",
    "color_jitter colour_jitter jitter jitter_strength color_strength cj_strength s": "--model.strength {1.0}",
    "blur gaussian_blur gaussian_prob gaussian_blur_prob": "--model.blur_prob {0.5}",
    "flip hflip hflip_prob hf_prob horizontal_flip horizontal_flip_prob": "--model.flip_prob {0.5}",
    "min_scale min_crop_scale crop_min_scale rr_min": "--model.crop_scale [{0.08},1.0]",
    "clip clip_grad grad_clip clip_grad_norm max_grad_norm gradient_clip": "--trainer.gradient_clip_val {1.0}",
    "max_hours timeout time_limit": "--trainer.max_time 00:01:00:00",
    "nan_policy skip_nan skip_nonfinite skip_nan_steps": "--on_nonfinite skip",
    "terminate_on_nan detect_nan stop_on_nan": "Leave it out: a loss or gradient that is not finite stops the run.",
    "ssl_method algorithm": "--method {simclr}",
    "gather gather_distributed": "Leave it out: negatives always come from all devices.",
    _CONFIG: "--config {shapes_resnet8}",
    "debug dry_run test_run smoke_test": "--trainer.fast_dev_run true",
    "no_progress progress progress_bar no_progress_bar": "--trainer.enable_progress_bar false",
    "linear_probe online_linear online_probe probe_every": "--probe.every_n_epochs {5}",
    "eval evaluate linear_eval test_only": "Leave it out: simclr linear-eval runs/NAME measures a run.",
    "report": "Leave it out: simclr report runs/NAME writes a run's page.",
    "version": "Use simclr --version.",
}
_MEASURE = {
    f"{_RUN} run_dir ckpt_path": "--checkpoint {runs/NAME}",
    "max_epochs num_epochs n_epochs e": "--epochs {100}",
    "bs batch b": "--batch_size {512}",
    "lr learning_rate": "--base_lr {0.1}",
    "wd decay": "--weight_decay {0.0}",
    "k knn n_neighbors neighbors neighbours": "--knn_k {200}",
    "temperature tau temp": "--knn_temperature {0.1}",
    "method eval_type probe classifier mode": "--protocol {lbfgs}",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    _WORKERS: "--data.workers {4}",
    f"{_FOLDER} train_dir": "--data.train_dir {photos/train}",
    f"{_TEST} test_dir": "--data.test_dir {photos/test}",
    "data_dir datadir data_root": "Use --data.train_dir {photos} and --data.test_dir photos/test.",
    "dataset data_set dataset_name ds source": "--data.source {cifar10} --data.data_dir datasets",
    "image_size img_size size input_size": "Leave it out: images have the size that the encoder was trained on.",
    "seed seed_everything": "Leave it out: nothing in an evaluation is left to chance.",
    "precision amp fp16 bf16": "Leave it out: features are computed in float32.",
    f"{_OUT}": "Leave it out: linear_eval.json is written into the run's folder.",
    _CONFIG: "--config {cifar10}",
    "version": "Use simclr --version.",
}
_EVAL = {
    f"{_RUN} run_dir ckpt_path": "--checkpoint {runs/NAME}",
    "max_epochs num_epochs n_epochs e epochs": "Use --heads.epochs 10, --linear.epochs 100 or --finetune.epochs 30.",
    "bs batch b batch_size": "Use --heads.batch_size 256 or --linear.batch_size 512.",
    "lr learning_rate base_lr": "Use --linear.base_lr 0.1, or --heads.lrs [0.01,0.1] for a choice.",
    "wd decay weight_decay": "Use --linear.weight_decay 0.0 or --heads.weight_decay 0.0.",
    "k n_neighbors neighbors neighbours knn_k": "--knn.k {20}",
    "temperature tau temp t knn_temperature": "--knn.temperature {0.1}",
    "method eval_type probe classifier mode protocol task tasks": "Use --protocols knn,logreg.",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    _WORKERS: "--data.workers {4}",
    f"{_FOLDER} train_dir".replace(" root ", " "): "--data.train_dir {photos/train}",
    f"{_TEST} test_dir": "--data.test_dir {photos/test}",
    "data_dir datadir data_root": "Use --data.train_dir {photos} and --data.test_dir photos/test.",
    "dataset data_set dataset_name ds source": "--data.source {cifar10} --data.data_dir datasets",
    "image_size img_size size input_size": "Leave it out: images have the size that the encoder was trained on.",
    "seed seed_everything": "Use --heads.seed 1 or --semi.seed 1.",
    "precision amp fp16 bf16": "Leave it out: features are computed in float32.",
    "no_cache nocache use_cache": "--cache false",
    "features feature_dir features_dir": "--cache_dir {features}",
    "fractions label_fraction percent labels": "Use --semi.fractions [0.01,0.1].",
    f"{_OUT}": "Leave it out: eval.json and eval.md are written into the run's folder.",
    "version": "Use simclr --version.",
}
_VERIFY = {
    f"{_RUN} run_dir checkpoint ckpt_path path".replace("run ", "", 1): "--run {runs/NAME}",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    _FOLDER: "--train_dir {photos}",
    _TEST: "--test_dir {photos/test}",
    "version": "Use simclr --version.",
}
_REPORT = {
    f"{_RUN} checkpoint ckpt_path path": "--run_dir {runs/NAME}",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    f"{_OUT} html": "Leave it out: report.html is written into the run's folder.",
    "data train_dir test_dir data_dir images": "Leave it out: a report shows the images that the run was trained on.",
    "version": "Use simclr --version.",
}
_COMPARE = {
    f"{_RUN} run_dir run_dirs checkpoint ckpt_path path paths": "Use simclr compare runs/NAME runs/OTHER.",
    f"{_OUT} page report": "--html {compare.html}",
    "md": "--markdown {compare.md}",
    "table terminal print": "Leave it out: the tables are always printed.",
    "version": "Use simclr --version.",
}
_EXPORT = {
    f"{_RUN} run_dir checkpoint ckpt_path path".replace(" encoder ", " "): "--encoder {runs/NAME}",
    _OUT.replace("out output ", "output "): "--out {exported}",
    "f type to fmt kind target": "--format {onnx}",
    "onnx torchvision timm safetensors": "Use --format onnx, torchvision, timm, safetensors or torch-export.",
    "torchscript jit script pt2 torch_export": "--format torch-export",
    "preprocess transform normalize include_preprocessing": "--preprocessing inside",
    "licence": "--license {MIT}",
    "version": "Use simclr --version.",
}
_CHECK = {
    _FOLDER: "--train_dir {photos}",
    _TEST: "--test_dir {photos/test}",
    _WORKERS: "--workers {4}",
    "on_error": "Leave it out: every image is tried, whatever is wrong with others.",
    "version": "Use simclr --version.",
}
_REPLAY = {
    "path file step run run_dir checkpoint ckpt_path": "Use simclr replay runs/NAME/nonfinite_step_N.pt.",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    "precision amp fp16 bf16": "Leave it out: the run's precision and finer ones are computed.",
    _FOLDER: "Leave it out: the images are in the dump.",
    f"{_OUT}": "--json replay.json",
    "version": "Use simclr --version.",
}
_OTHERS_RUN = f"{_RUN} run_dir checkpoint ckpt_path path".replace(" encoder ", " ").replace(" weights ", " ")
_EMBED = {
    _OTHERS_RUN: "--encoder {runs/NAME}",
    _FOLDER.replace(" images ", " "): "--images {photos}",
    _OUT.replace("out output ", "output "): "--out {features}",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    _WORKERS: "--workers {4}",
    "bs batch bsz b": "--batch_size {64}",
    "size img_size input_size resolution": "--image_size {224}",
    "type fmt output_format": "--format {parquet}",
    "skip_errors ignore_errors skip skip_unreadable": "--on_error skip",
    "random random_init untrained": "--random_weights true",
    "resume continue": "Leave it out: the same command given again goes on.",
    "precision amp fp16 bf16": "Leave it out: features are computed in float32.",
    "version": "Use simclr --version.",
}
_SEARCH = {
    "query file path img input": "--image {photo.jpg}",
    "folder features embedded embeddings index db database gallery": "--in {features}",
    "top n topk top_k number count num": "--k {12}",
    f"{_OUT} sheet picture": "--png {search.png}",
    _OTHERS_RUN: "--encoder {runs/NAME}",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    "version": "Use simclr --version.",
}
_DUPLICATES = {
    _FOLDER.replace(" folder ", " "): "--folder {photos}",
    "features embedded embeddings": "--in {features}",
    "threshold cosine similarity min_similarity": "--min_cosine {0.98}",
    f"{_OUT} list": "--copies {copies.txt}",
    _OTHERS_RUN: "--encoder {runs/NAME}",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    _WORKERS: "--workers {4}",
    "version": "Use simclr --version.",
}
_FIT = {
    _OTHERS_RUN: "--encoder {runs/NAME}",
    f"{_FOLDER} train_dir".replace(" data ", " "): "--data.train_dir {labelled}",
    _OUT.replace("out output ", "output "): "--out {classifier.safetensors}",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    _WORKERS: "--workers {4}",
    "bs batch bsz b": "--batch_size {64}",
    "random_seed seed_everything": "--seed {0}",
    "epochs lr regularization c": "Leave it out: the regularisation is chosen on a split of the training images.",
    "version": "Use simclr --version.",
}
_PREDICT = {
    "clf head probe": "--classifier {classifier.safetensors}",
    _FOLDER.replace(" images ", " "): "Use simclr predict photos --classifier runs/NAME.",
    f"{_OUT} save": "--csv {predictions.csv}",
    _OTHERS_RUN: "--classifier {runs/NAME}",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    _WORKERS: "--workers {4}",
    "version": "Use simclr --version.",
}
_ABLATE = {
    "experiment ablation exp which": "--name {temperature}",
    "all show experiments ls": "Use simclr ablate --list.",
    "n_seeds num_seeds seed seed_everything repeats runs n": "--seeds {3}",
    "workers num_workers parallel processes j n_jobs": "--jobs {2}",
    "data dataset train_dir data_dir data_path root images_dir": "--images {photos}",
    _GPU: "--device cuda",
    _CPU: "--device cpu",
    _OUT.replace("out output ", "output "): "--out {ablations}",
    "resume continue": "Leave it out: the same command given again goes on, and skips what is done.",
    "version": "Use simclr --version.",
}
HINTS = {
    command: {name: text for names, text in table.items() for name in names.split()}
    for command, table in (
        ("train", _TRAIN),
        ("profile", _TRAIN),
        ("supervised", _TRAIN),
        ("linear-eval", _MEASURE),
        ("eval", _EVAL),
        ("verify", _VERIFY),
        ("report", _REPORT),
        ("compare", _COMPARE),
        ("check-data", _CHECK),
        ("export", _EXPORT),
        ("replay", _REPLAY),
        ("embed", _EMBED),
        ("search", _SEARCH),
        ("duplicates", _DUPLICATES),
        ("fit", _FIT),
        ("predict", _PREDICT),
        ("ablate", _ABLATE),
    )
}
# Values under other programs' names.
_PRECISIONS = {"16": "16-mixed", "fp16": "16-mixed", "float16": "16-mixed", "half": "16-mixed", "amp": "16-mixed"}
_PRECISIONS |= {"bf16": "bf16-mixed", "bfloat16": "bf16-mixed", "32": "32-true", "fp32": "32-true"}
_PRECISIONS |= {"float32": "32-true", "full": "32-true", "fp64": "64-true", "float64": "64-true"}
LISTS = {
    "model.crop_scale": (0.08, 1.0),
    "model.mean": (0.5,) * 3,
    "model.std": (0.25,) * 3,
}  # where the default is none
VALUES = {
    "trainer.precision": _PRECISIONS,
    "model.optimizer": {"adam": "adamw", "AdamW": "adamw", "LARS": "lars", "SGD": "sgd", "Adam": "adamw"},
    "trainer.strategy": {"dp": "ddp", "ddp2": "ddp", "horovod": "ddp"},
    "trainer.accelerator": {"cuda:0": "gpu", "true": "gpu", "True": "gpu", "0": "gpu", "1": "gpu"},
    "protocol": {"linear": "lbfgs", "logistic": "lbfgs", "lbgfs": "lbfgs", "SGD": "sgd"},
}
GROUPS = {
    "data": "--data.train_dir {photos}",
    "model": "--model.encoder {resnet18}",
    "knn": "--knn.k {20}",
    "probe": "--probe.every_n_epochs {5}",
}
GROUPS |= {"trainer": "--trainer.max_epochs {100}", "checkpoint": "--ckpt_path {runs/NAME/checkpoints/last.ckpt}"}
REQUIRED = {
    "monitor": "--trainer.callbacks.monitor train_loss_epoch",
    "checkpoint": "simclr linear-eval runs/NAME",
    "run_dir": "simclr report runs/NAME",
    "runs": "simclr compare runs/NAME runs/OTHER",
    "encoder": "simclr export runs/NAME",
    "train_dir": "simclr check-data photos",
    "eval checkpoint": "simclr eval runs/NAME",
    "run": "simclr verify runs/NAME",
    "image": "simclr search photo.jpg --in features",
    "in": "--in features",
    "folder": "simclr duplicates photos",
    "fit encoder": "simclr fit runs/NAME --data.train_dir labelled",
    "data.train_dir": "--data.train_dir labelled",
    "predict images": "simclr predict photo.jpg --classifier runs/NAME",
    "classifier": "--classifier runs/NAME",
    "embed encoder": "--encoder runs/NAME",
    "images": "simclr embed photos --encoder runs/NAME --out features",
    "out": "--out features",
    "dump": "simclr replay runs/NAME/nonfinite_step_N.pt",
}
EXAMPLES = {
    "config": "shapes_resnet8",
    "data.train_dir": "photos",
    "data.test_dir": "photos/test",
    "probe.train_dir": "labelled",
    "run_dir": "runs/first",
}
EXAMPLES |= {
    "resume": "auto",
    "ckpt_path": "runs/NAME/checkpoints/last.ckpt",
    "checkpoint": "runs/NAME",
    "data.data_dir": "datasets",
}
EXAMPLES |= {"data.cache_dir": "cache", "trainer.precision": "32-true", "trainer.max_steps": "1000"}
COMMANDS = {
    "train": "pretrain training learn run ssl_train",
    "supervised": "labels with_labels train_supervised supervise classification cross_entropy",
    "linear-eval": "linear linear_probe lineareval",
    "eval": "evaluate evaluation probe knn logreg test validate benchmark score",
    "verify": "reproduce_results check_results prove recompute",
    "report": "plot html visualize visualise page show summary",
    "profile": "prof speed time bench",
    "compare": "diff versus vs table leaderboard",
    "export": "convert onnx save dump freeze to_onnx",
    "replay": "rerun reproduce debug",
    "check-data": "check scan doctor check_images verify_data validate_data",
    "search": "find nearest neighbours neighbors similar query retrieve",
    "fit": "train_classifier train_probe fit_probe",
    "predict": "classify label inference_images",
    "duplicates": "dedup deduplicate duplicate dupes copies near_duplicates",
    "embed": "features extract embeddings extract_features encode infer inference",
    "ablate": "ablation ablations experiment experiments study papers findings",
}


def unknown_option(command: str, key: str, value: str | None, known: Collection[str], linked: dict[str, str]) -> str:
    """What to type in place of an option that does not exist.

    Args:
        command: whose option it is.
        key: as typed, with or without its dashes.
        value: what was given with it, if anything.
        known: the keys that can be given.
        linked: keys that follow others: key -> the one to give.
    """
    name = key.lstrip("-").replace("-", "_")
    if name in known:
        return f"Did you mean {name}?"
    if name in linked:
        return f"It follows {linked[name]}. {_use(f'--{linked[name]} {{{value or 32}}}', value)}"
    last = name.rpartition(".")[2].lower()
    if template := HINTS[command].get(last):
        return _use(template, value)
    same_end = [k for k in known if k.rpartition(".")[2] == last]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    of_last = [k for k in known if difflib.SequenceMatcher(None, k.rpartition(".")[2], last).ratio() >= 0.8]
    if meant := same_end or nearest or of_last:
        return f"Did you mean {meant[0]}?"
    return "See --help for the keys there are."


def group_value(group: str, value: object) -> str:
    """What to type where a whole group, such as --data, was given a value."""
    said = _use(GROUPS[group], value if isinstance(value, str) else None) if group in GROUPS else ""
    return f"{group} is a group of settings. {said or 'See --help for those in it.'}"


def other_value(key: str, value: str) -> str:
    """What to type for a value under another program's name; empty if it is not known."""
    meant = VALUES.get(key, {}).get(value)
    return f" Use --{key} {meant}." if meant else ""


def _use(template: str, value: str | None) -> str:
    """A hint as a sentence, with the value that was given in it where it fits."""
    if value in _NAMED_SETS and "--data.train_dir {" in template:
        template = "--data.source {cifar10} --data.data_dir datasets"
    if "--data.source {" in template and value is not None and value not in _NAMED_SETS:
        template = "--data.train_dir {photos}"
    if value == "shapes":
        template = template.replace(" --data.data_dir datasets", "")

    def fill(found: re.Match) -> str:
        key, example = found["key"], found["example"]
        known = VALUES.get(key, {})
        if value is None or value.lower() in ("true", "yes", "on"):
            return f"--{key} {found['before']}{example}"
        is_path = bool(re.search(r"[/\\.~]", value)) or Path(value).exists()
        fits = is_path or "NAME" not in example  # a run, which must be there
        fits &= not re.fullmatch(r"[\d.]+", example) or bool(re.fullmatch(r"[-+\d.e]+", value))
        fits &= key != "protocol" or value in ("lbfgs", "sgd")
        chosen = known.get(value, value if fits else example)
        return f"--{key} {found['before']}{chosen}"

    filled = re.sub(r"--(?P<key>[\w.]+) (?P<before>[^\s{]*)\{(?P<example>[^}]*)\}", fill, template)
    return f"Use {filled.rstrip('.')}." if filled.startswith("--") else filled


def as_yaml(hint: str) -> str:
    """A hint for someone who writes a file of settings: `key: value` in place of `--key value`."""
    return re.sub(r"--(?!help)([\w.]+) ([^\s]+?)(?=[.,]?(?:\s|$))", r"\1: \2", hint)


def unknown_command(given: str, known: Collection[str]) -> str:
    """What to type in place of `simclr GIVEN`."""
    name = given.lstrip("-").replace("-", "_").lower()
    meant = [command for command, names in COMMANDS.items() if name in (command.replace("-", "_"), *names.split())]
    meant = meant or difflib.get_close_matches(given, known, n=1)
    path = Path(given).expanduser()
    if name in ("help", "h"):
        return f"unknown command {given}. Use simclr --help, or simclr train --help."
    if name in ("v", "version"):
        return f"unknown command {given}. Use simclr --version."
    if meant:
        return f"unknown command {given}. Did you mean {meant[0]}?"
    if given.startswith("-"):
        return f"{given} stands where the command should. Begin with simclr {', '.join(known)}."
    if path.suffix in (".yaml", ".yml"):
        return f"unknown command {given}. Use simclr train --config {given}."
    if path.suffix == ".ckpt" or (path / "checkpoints").is_dir():
        return f"unknown command {given}. Use simclr linear-eval {given}."
    if path.is_dir():
        return f"unknown command {given}. Use simclr train {given}."
    return f"unknown command {given}. There are {', '.join(known)}."


def refuse_file_as_encoder(name: str) -> None:
    """Refuse a file or a run where the name of an encoder is needed.

    Raises:
        ValueError: with what to do with a run.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".pt", ".pth", ".ckpt", ".safetensors") and not (path / "checkpoints").is_dir():
        return
    folder = next((p for p in (path, *path.parents) if (p / "checkpoints" / "last.ckpt").is_file()), Path("runs/NAME"))
    raise ValueError(
        f"model.encoder={name} is a file of weights or a run: the name of a network is needed, such as --model.encoder "
        f"resnet18. To begin with its weights: --model.weights {name} beside it. To continue a run: --ckpt_path "
        f"{folder}. To measure it: simclr linear-eval {folder}."
    )
