from fastguard.methods.training import Role, Training


class GradientAscent(Training):
    roles = {"harmful": Role("harmful"), "harmless": Role("safe")}  # noqa: RUF012

    def __init__(self, model, *, weight=0.1, seed=0):
        super().__init__(model, seed=seed)
        self.weight = weight

    def gradient(self, step, *, harmful, harmless):
        up = step.differentiate(step.loss(harmful), "harmful batch", -step.scale * self.weight)
        down = step.differentiate(step.loss(harmless), "harmless batch")
        return {"loss": down - self.weight * up, "harmful_ce": up, "harmless_ce": down}
