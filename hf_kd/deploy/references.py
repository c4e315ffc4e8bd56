"""Papers and data sets that a model card names."""

# Form of a term -> authors and year, title, where it is. The docstrings in `objective/losses` say which equation.
# attention:cosine is of no paper.
PAPERS: dict[str, tuple[str, str, str]] = {
    "logit:kl": (
        "Hinton et al. 2015",
        "Distilling the Knowledge in a Neural Network",
        "https://arxiv.org/abs/1503.02531",
    ),
    "logit:reverse_kl": (
        "Gu et al. 2024",
        "MiniLLM: Knowledge Distillation of Large Language Models",
        "https://arxiv.org/abs/2306.08543",
    ),
    "logit:js": (
        "Agarwal et al. 2024",
        "On-Policy Distillation of Language Models",
        "https://arxiv.org/abs/2306.13649",
    ),
    "logit:mse": ("Ba & Caruana 2014", "Do Deep Nets Really Need to be Deep?", "https://arxiv.org/abs/1312.6184"),
    "logit:dist": (
        "Huang et al. 2022",
        "Knowledge Distillation from A Stronger Teacher",
        "https://arxiv.org/abs/2205.10536",
    ),
    "logit:standardized_kl": (
        "Sun et al. 2024",
        "Logit Standardization in Knowledge Distillation",
        "https://arxiv.org/abs/2403.01427",
    ),
    "logit:decoupled_kl": ("Zhao et al. 2022", "Decoupled Knowledge Distillation", "https://arxiv.org/abs/2203.08679"),
    "hidden:mse": (
        "Jiao et al. 2020",
        "TinyBERT: Distilling BERT for Natural Language Understanding",
        "https://arxiv.org/abs/1909.10351",
    ),
    "hidden:cosine": (
        "Sanh et al. 2019",
        "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
        "https://arxiv.org/abs/1910.01108",
    ),
    "hidden:pkd": (
        "Sun et al. 2019",
        "Patient Knowledge Distillation for BERT Model Compression",
        "https://arxiv.org/abs/1908.09355",
    ),
    "hidden:gram": (
        "Yim et al. 2017",
        "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
        "https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html",
    ),
    "hidden:nst": (
        "Huang & Wang 2017",
        "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        "https://arxiv.org/abs/1707.01219",
    ),
    "attention:kl": (
        "Wang et al. 2020",
        "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
        "https://arxiv.org/abs/2002.10957",
    ),
    "relation:minilm_v2": (
        "Wang et al. 2021",
        "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
        "https://arxiv.org/abs/2012.15828",
    ),
    "relation:similarity": (
        "Tung & Mori 2019",
        "Similarity-Preserving Knowledge Distillation",
        "https://arxiv.org/abs/1907.09682",
    ),
    "relation:rkd": ("Park et al. 2019", "Relational Knowledge Distillation", "https://arxiv.org/abs/1904.05068"),
    "relation:pkt": (
        "Passalis & Tefas 2018",
        "Learning Deep Representations with Probabilistic Knowledge Transfer",
        "https://arxiv.org/abs/1803.10837",
    ),
    "relation:correlation": (
        "Peng et al. 2019",
        "Correlation Congruence for Knowledge Distillation",
        "https://arxiv.org/abs/1904.01802",
    ),
    "relation:crd": (
        "Tian et al. 2020",
        "Contrastive Representation Distillation",
        "https://arxiv.org/abs/1910.10699",
    ),
}
PAPERS["logit:soft_ce"] = PAPERS["logit:kl"]
PAPERS["attention:mse"] = PAPERS["hidden:mse"]
PAPERS["relation:minilm_v1"] = PAPERS["attention:kl"]
# What the rows of `hf_kd.augmentation` are made after.
AUGMENTATION_PAPERS = {
    "masking": (
        "Tang et al. 2019",
        "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks",
        "https://arxiv.org/abs/1903.12136",
    ),
    "masked_lm": PAPERS["hidden:mse"],
}

# The configuration of `nyu-mll/glue` -> its name, and where its texts come from
# (Wang et al. 2019, https://arxiv.org/abs/1804.07461, table 1).
GLUE_TEXTS = {
    "cola": ("CoLA", "sentences from publications on linguistics"),
    "sst2": ("SST-2", "phrases and sentences of film reviews"),
    "mrpc": ("MRPC", "sentence pairs from online news"),
    "stsb": ("STS-B", "sentence pairs from news headlines, captions and forums"),
    "qqp": ("QQP", "question pairs from Quora"),
    "mnli": ("MNLI", "sentence pairs on speech, fiction, letters and government reports"),
    "qnli": ("QNLI", "questions with sentences of Wikipedia"),
    "rte": ("RTE", "sentence pairs from news and Wikipedia"),
    "wnli": ("WNLI", "sentence pairs from fiction"),
}
