"""Which field somebody meant: other libraries' words for ours, and misspellings."""

import difflib
from collections.abc import Collection

# The words of timm, transformers, ultralytics, PEFT and big_vision, without their sections.
WORDS = {
    "optim.lr": "learning_rate base_lr base_learning_rate peak_lr max_lr blr lr0 init_lr",
    "total_steps": "epochs epoch num_epochs num_train_epochs max_epochs total_epochs step steps "
    "max_steps num_steps train_steps num_train_steps training_steps iterations max_iter num_iters "
    "updates",
    "optim.warmup_steps": "warmup warmup_epochs warmup_ratio warmup_iters num_warmup_steps",
    "batch_size": "bs batch train_batch_size per_device_train_batch_size per_device_batch_size "
    "global_batch_size",
    "evaluate.batch_size": "eval_batch_size per_device_eval_batch_size val_batch_size",
    "optim.weight_decay": "wd decay",
    "optim.final_weight_decay": "weight_decay_end",
    "dino.local_crops": "local_crops_number",
    "dino.local_size": "local_crops_size",
    "dino.global_scale": "global_crops_scale",
    "dino.local_scale": "local_crops_scale",
    "dino.teacher_temperature": "teacher_temp warmup_teacher_temp",
    "dino.temperature_steps": "warmup_teacher_temp_epochs",
    "dino.frozen_steps": "freeze_last_layer freeze_last_layer_epochs",
    "dino.koleo_weight": "koleo_loss_weight",
    "text.length": "max_length max_seq_length context_length token_len text_length",
    "text.tokenizer": "tokenizer_name tokenizer_path",
    "text.caption_column": "caption_key text_column csv_caption_key",
    "text.path_column": "image_column csv_img_key",
    "optim.name": "optimizer opt optimizer_name",
    "optim.schedule": "scheduler sched lr_scheduler lr_scheduler_type lr_schedule",
    "optim.clip_norm": "grad_clip clip_grad max_grad_norm clip gradient_clip gradient_clip_val "
    "grad_clip_norm",
    "optim.accumulate": "gradient_accumulation_steps accum_steps accum_iter grad_accum "
    "grad_accum_steps accumulation_steps accumulate_grad_batches",
    "optim.ema_decay": "ema model_ema model_ema_decay momentum_teacher",
    "optim.lr_multipliers": "rates lr_mult",
    "optim.layer_decay": "llrd layerwise_lr_decay layer_lr_decay",
    "optim.b1": "beta1 adam_beta1 betas",
    "optim.b2": "beta2 adam_beta2",
    "model.weights": "pretrained checkpoint ckpt init model_name_or_path pretrained_model "
    "initial_checkpoint finetune",
    "model.variant": "arch architecture model_name backbone model.name model.arch",
    "model.image_size": "img_size imgsz input_size resolution image_res img",
    "model.dtype": "precision amp fp16 bf16 mixed_precision half compute_dtype",
    "model.drop_path": "drop_path_rate stochastic_depth",
    "model.dropout": "drop drop_rate dropout_rate",
    "model.merge": "tome token_merging merge_tokens tokens_r",
    "model.remat": "gradient_checkpointing grad_checkpointing checkpointing",
    "model.freeze_norm": "freeze_bn frozen_bn",
    "trainable": "freeze unfreeze frozen freeze_layers",
    "quantize.double": "bnb_4bit_use_double_quant double_quant",
    "quantize.form": "bnb_4bit_quant_type load_in_4bit load_in_8bit quant_type",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.rules": "target_modules lora_targets",
    "lora.dropout": "lora_dropout",
    "lora.dora": "use_dora",
    "lora.rank_stabilized": "use_rslora rslora",
    "data.train": "data.root data.path data.dir dataset data_path data_dir data_root train_data "
    "train_dir train_path",
    "data.eval": "val val_data val_dir val_path validation eval_data test eval_dir",
    "data.balance": "sampler weighted_sampler weighted_random_sampler class_balanced "
    "balanced_sampling oversample",
    "data.holdout": "val_split validation_split test_size val_fraction",
    "data.threads": "num_threads",
    "data.workers": "num_workers dataloader_num_workers",
    "augment.label_smoothing": "smoothing label_smoothing_factor",
    "augment.erasing": "reprob random_erasing",
    "augment.policy": "aa auto_augment randaugment rand_augment",
    "augment.mixup": "mixup_alpha",
    "augment.cutmix": "cutmix_alpha",
    "evaluate.stop_after": "patience early_stopping early_stop early_stopping_patience",
    "evaluate.every": "eval_every eval_steps eval_interval val_interval eval_freq",
    "checkpoint_every": "save_every save_steps save_interval checkpoint_interval save_freq",
    "log_every": "logging_steps log_interval log_freq print_freq",
    "seed": "random_seed rng_seed",
    "adversarial.epsilon": "eps attack_eps",
    "adversarial.step_size": "pgd_step_size attack_lr",
    "data.short": "shortest_edge min_size",
    "data.longest": "longest_edge max_size",
    "adversarial.steps": "attack_steps pgd_steps",
    "distill.temperature": "tau distillation_tau",
    "distill.teachers": "teacher teacher_model",
    "evaluate.score": "score_threshold conf threshold",
}
# What is no field here, and what to do instead.
ELSEWHERE = {
    "results go to the folder of the flag --workdir=DIR": "workdir work_dir output_dir out_dir "
    "output save_dir log_dir logdir logging_dir exp_dir run_dir project",
    "the data's classes are counted": "num_classes nb_classes n_classes num_labels nc",
    "the same command run again resumes": "resume resume_from resume_from_checkpoint auto_resume",
    "JAX takes all devices that it finds; JAX_PLATFORMS=cpu in the environment chooses": "device "
    "devices gpu gpus num_gpus n_gpu cuda accelerator use_gpu",
}
# Fields that had another name: old -> new. A run's own config.json is read by the old name too.
RENAMED = {
    "optim.rates": "optim.lr_multipliers",
    "adversarial.step": "adversarial.step_size",
    "evaluate.patience": "evaluate.warn_after",
}
EPOCHS = "; an epoch is the number of training images / batch_size updates"


def suggest(name: str, known: Collection[str]) -> str:
    """A clause that names the field meant by `name` or says what to do instead, or nothing.

    Examples:
      >>> suggest("optim.learning_rate", ["optim.lr", "optim.schedule"])
      ': did you mean `optim.lr`?'
    """
    for old, new in RENAMED.items():
        if name == old and new in known:  # without its section it may mean anything
            return f": it is `{new}` now"
    last = name.rpartition(".")[2].replace("-", "_").lower()
    section = [one for one in known if one.startswith(f"{name}.")]
    if section:
        return f": it is a section, set one of its fields, such as `{section[0]}`"
    word = next((f for f, words in WORDS.items() if {last, name} & {*words.split()}), "")
    instead = next((text for text, words in ELSEWHERE.items() if last in words.split()), "")
    same = [one for one in known if one.rpartition(".")[2] == last]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if instead and not same:
        return f": {instead}"
    if near and not same:
        field = near[0]
    elif word in known:
        field = word
    elif len(same) == 1:
        field = same[0]
    else:
        close = difflib.get_close_matches(name, same or known, n=1, cutoff=0.0 if same else 0.65)
        lasts = {one.rpartition(".")[2]: one for one in known}
        close = close or [
            lasts[one] for one in difflib.get_close_matches(last, lasts, n=1, cutoff=0.7)
        ]
        if not close:
            return ""
        field = close[0]
    return f": did you mean `{field}`?{EPOCHS if 'epoch' in last else ''}"
