"""RF-DETR, pretrained on COCO, fine-tuned on your own boxes in tens of epochs.

Command:   python -m vision_jax.main --config=configs/rf_detr_finetune.py \\
               --config.data.train=annotations.json --config.data.images=path/to/images
Hardware:  one GPU with 24 GB at batch 16; more devices share the batch
Expected:  depends on the data; rfdetr's own recipe, in which 10 to 50 epochs are usual

The recipe is that of the package rfdetr 1.11 (config.py, training/param_groups.py): AdamW, the
backbone at 1.5 · 0.7² of the rate and falling by 0.8 from block to block, the decoder at 0.7, a
moving average, losses of 13 groups of queries. It also trains at several image sizes, which this
one does not. Other recipes are overrides of this one:

    a larger model               --config.model.weights=hf://Roboflow/rf-detr-small (medium, large)
    a file of rfdetr's           --config.model.weights=rf-detr-nano.pth
                                 --config.model.allow_pickle=True
    other image size             --config.model.image_size=512 (a multiple of 32; base: of 56)
    a frozen backbone            --config.trainable="(?!backbone).*"
    LoRA on the backbone         --config.recipes=lora
                                 --config.lora.rules="backbone/.*(qkv|proj|fc\\d)/kernel"
                                 --config.trainable="(?!backbone).*"
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field there is; set one on the command line with --config.FIELD=VALUE."""
    config = ConfigDict()
    config.task = "detection"
    config.seed = 0  # of initialization, data order, augmentation and dropout
    config.batch_size = 16  # images per update, over all devices
    config.total_steps = 5_000  # updates
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # devices: -1 takes what is left
    config.sharding_rules = ()  # (path regex, mesh axes) before the default; see docs/training.md
    # Which parameters train besides adapters: regexes over whole paths.
    config.trainable = (".*",)
    # What is on, each with the section of its name: lora, adversarial, distill.
    config.recipes = ()

    config.model = model = ConfigDict()
    # A .safetensors file, a folder in Hugging Face layout, hf://owner/name; "" starts from random
    # initialization.
    model.weights = "hf://Roboflow/rf-detr-nano"
    model.allow_pickle = False  # read .pth and .bin files too (needs torch; only if you trust them)
    model.variant = ""  # such as "rf_detr_nano"; "" takes the architecture from the weights
    model.arguments = ()  # more of the model's, as ((name, value), ...)
    # Of bigger weights, what a smaller student keeps: ((row, indices or how many), ...)
    model.layers = ()  # such as (("decoder", 3),); () keeps all; docs/distillation.md
    model.width = 0  # of a narrower ViT, cut out of wider weights; 0 keeps theirs
    model.mlp_width = 0
    # Paths not taken from the weights: another set of classes keeps everything but these heads.
    model.reinitialize = (r"(proposals_\d+/)?class_head/.*",)
    model.drop = ()  # tensors of the weights to leave out on purpose: regexes over their own names
    model.image_size = 0  # of square images, in pixels a side; 0 takes the weights' own
    model.mean = ()  # of the images in [0, 1], per channel; () takes the weights' own
    model.std = ()
    model.dtype = "float32"  # compute dtype; parameters are float32. bfloat16 on GPU and TPU
    model.dropout = 0.0
    model.drop_path = 0.0  # stochastic depth, where the architecture has it
    model.freeze_norm = True  # BatchNorm keeps its running statistics in training
    model.remat = False  # recompute activations in the backward pass: less memory, more time
    model.scan = False  # one compiled block in a loop, where the architecture has it

    config.lora = lora = ConfigDict()
    lora.rules = ()  # kernels that get an adapter: regexes over whole paths
    lora.rank = 8
    lora.alpha = 16.0  # the update is scaled by alpha / rank
    lora.rank_stabilized = False  # by alpha / sqrt(rank) instead
    lora.dropout = 0.0  # on the adapter's input
    lora.dora = False  # train each output's magnitude too (DoRA)
    lora.qkv_parts = ""  # "q,v": adapters of their own for these parts of a fused qkv kernel
    lora.init_from = ""  # a folder with a PEFT adapter to start from, instead of rules

    config.adversarial = adversarial = ConfigDict()  # training on attacked images
    adversarial.method = "pgd"  # pgd, fast, free
    adversarial.norm = "linf"  # of perturbations: linf, l2
    adversarial.epsilon = 4 / 255  # their largest norm; images are in [0, 1]
    adversarial.steps = 3  # of each attack (fast and free have one)
    adversarial.step = 0.0  # its length as a share of epsilon; 0 takes the method's usual one
    adversarial.beta = 6.0  # weight of the divergence, of trades and mart
    adversarial.replays = 4  # updates a batch, of free
    adversarial.weight_epsilon = 0.0  # kernels are shifted too, by this share of their norm (AWP)
    adversarial.warmup_steps = 0  # epsilon grows linearly from 0 over them

    config.distill = distill = ConfigDict()  # learning from teachers
    # Finished runs, or weights as in model.weights; "ema" is the student's own moving average.
    distill.teachers = ()
    distill.teacher_weights = ()  # of several teachers; () for equal ones
    distill.dtype = "float32"  # that teachers are kept and compute in: float32, bfloat16
    distill.logits = "queries"  # what is learned of them: queries, none
    distill.temperature = 1.0
    distill.weight = 0.5  # of the logits' loss; that of the labels has the rest of 1
    distill.token = False  # of classifiers
    # ((kind, layer, layer of the first teacher, weight), ...): hint, attention_transfer,
    # attention_maps, patch_tokens, relational_distance, relational_angle; docs/distillation.md
    distill.features = ()
    distill.top_k = 0  # of classifiers
    distill.cache = ""  # a file of what they say, written by --mode=teach; "" asks them

    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # adamw, sgd, lars, lamb, lion, muon
    optim.lr = 1e-4
    optim.schedule = "constant"  # cosine, linear, constant, step; after the warm-up
    optim.warmup_steps = 0
    optim.drop_at = 2 / 3  # share of the updates after which step falls to a tenth
    optim.weight_decay = 1e-4  # on kernels and adapters, not on biases, norms and embeddings
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.momentum = 0.9  # sgd, lars, muon
    optim.clip_norm = 0.1  # largest global gradient norm; 0 turns clipping off
    optim.layer_decay = 0.8  # each earlier layer's rate is this times the next one's
    # (path regex, factor of the rate); the first counts.
    optim.rates = (("backbone/.*", 0.735), (r"(decoder_|position_fc).*", 0.7))
    optim.accumulate = 1  # micro-batches per update
    optim.ema_decay = 0.993  # moving average of what trains, used by evaluation; 0 for none

    config.data = data = ConfigDict()
    # COCO JSON, the plain JSON of one box an entry, a folder of Pascal VOC or YOLO files,
    # data.yaml, tfds:NAME/SPLIT, embedded:aerial/SPLIT; see docs/detection_data.md
    data.train = ""
    data.images = ""  # folder of the images; "" takes the annotation file's own
    data.eval = ""  # "" holds out a share of data.train
    data.eval_images = ""  # "" takes data.images
    data.holdout = 0.1  # that share
    data.subset = 0  # train on this many images only, the classes in equal parts; 0 takes all
    # Of models that take other than squares; here, model.image_size decides.
    data.short = 0
    data.longest = 0
    data.buckets = 1
    data.interpolation = ""  # bicubic, bilinear, ...; "" takes the weights' own
    data.max_boxes = 100  # an image, at most the model's queries; the largest are kept
    # Training view: the share of images of which a window is cut out; mirrored or not; factors of
    # color drawn from 1 ± these.
    data.shorts = ()  # of models that take other than squares
    data.crop = 0.5
    data.flip = True
    data.brightness = 0.0
    data.contrast = 0.0
    data.saturation = 0.0
    data.threads = 4  # that decode images
    data.workers = 0  # processes that decode images; 0 uses threads alone
    data.max_damaged = 0.01  # stop when a larger share of the images can't be read

    config.loss = loss = ConfigDict()  # of pairs of query and box: to match them, then to train
    loss.class_cost = 2.0
    loss.l1_cost = 5.0
    loss.giou_cost = 2.0
    loss.class_weight = 1.0
    loss.l1_weight = 5.0
    loss.giou_weight = 2.0
    loss.no_object_weight = 0.1  # of DETR's class term; RF-DETR's has none

    config.evaluate = evaluate = ConfigDict()
    evaluate.every = 0  # updates, 0 for once an epoch; the end of training always evaluates
    evaluate.batch_size = 8
    evaluate.score = 0.5  # boxes below it are not drawn
    evaluate.patience = 500  # updates after which predictions must not be empty or constant

    config.robustness = robustness = ConfigDict()  # of --mode=robustness, on a finished run
    robustness.images = 500  # evenly spread over the evaluation data; 0 takes all
    robustness.batch_size = 8
    robustness.norm = "linf"  # linf, l2 or l1: of what epsilons measure, in pixels from 0 to 1
    robustness.epsilons = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
    robustness.attacks = ("fgsm", "pgd")
    robustness.steps = 10  # of pgd
    robustness.restarts = 1

    config.checkpoint_every = 500  # updates; evaluations are checkpointed too
    config.log_every = 10  # updates between lines in metrics.jsonl
    return config
