"""Student width -> teacher width."""

from torch import Tensor, nn


class Projection(nn.Module):
    """One linear map per layer, which exists for training alone and is no part of the student.

    TinyBERT's learnable transformation (https://arxiv.org/abs/1909.10351, equation 8). Where the widths are equal
    there is nothing to map and no parameter.

    Args:
        student_width (`int`): Width of the student's hidden states.
        teacher_width (`int`): Width of the teacher's hidden states.
        layers (`list[int]`): The student layers to map.
    """

    def __init__(self, student_width: int, teacher_width: int, layers: list[int]):
        super().__init__()
        self.maps = nn.ModuleDict()
        if student_width != teacher_width:
            self.maps.update({str(layer): nn.Linear(student_width, teacher_width) for layer in layers})

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """Map states of shape `(batch, seq, student_width)` to `(batch, seq, teacher_width)`, in float32."""
        hidden = hidden.float()
        return self.maps[str(layer)](hidden) if len(self.maps) else hidden
