"""The loss terms as pure tensor functions `(student, teacher, ...) -> scalar`.

Conventions that hold for every function here:

- student first, teacher second; both are converted to float32, and probabilities stay in log space;
- the teacher is a constant: no gradient flows into it;
- a term is a sum over what is valid divided by `num_items`, the number of valid items. By default that is the number
  in the tensors given, so the result is their mean. A trainer that accumulates gradients, or runs on several
  processes, passes the number in the whole optimisation step, and the parts then add up to the loss of the one large
  batch; terms that relate the rows of a batch to each other (`logit_dist` and the relations between texts) see the
  rows that one process has in one micro-batch, and add up to the mean of the parts, weighed by their rows;
- nothing valid gives 0 with a zero gradient, never NaN.
"""

from .attention import attention_cosine, attention_kl, attention_mse, attention_scores, attention_vectors_mse
from .hidden import first_token, hidden_cosine, hidden_gram, hidden_mse, hidden_nst, hidden_pkd
from .logits import (
    logit_decoupled_kl,
    logit_dist,
    logit_js,
    logit_kl,
    logit_mse,
    logit_reverse_kl,
    logit_soft_ce,
    logit_standardized_kl,
)
from .relations import (
    relation_correlation,
    relation_crd,
    relation_minilm_v1,
    relation_minilm_v2,
    relation_pkt,
    relation_rkd,
    relation_similarity,
)
from .task import task_loss


__all__ = [
    "attention_cosine",
    "attention_kl",
    "attention_mse",
    "attention_scores",
    "attention_vectors_mse",
    "first_token",
    "hidden_cosine",
    "hidden_gram",
    "hidden_mse",
    "hidden_nst",
    "hidden_pkd",
    "logit_decoupled_kl",
    "logit_dist",
    "logit_js",
    "logit_kl",
    "logit_mse",
    "logit_reverse_kl",
    "logit_soft_ce",
    "logit_standardized_kl",
    "relation_correlation",
    "relation_crd",
    "relation_minilm_v1",
    "relation_minilm_v2",
    "relation_pkt",
    "relation_rkd",
    "relation_similarity",
    "task_loss",
]
