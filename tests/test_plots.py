"""A figure of its own, never pyplot's; it shows where stages met and what is planned."""

from __future__ import annotations

import io
import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from runs import in_fresh_process

from nbtrain.journal import Journal
from nbtrain.plots import Curves, compared, curves, edited, words
from nbtrain.scales import Floats

FIRST: dict[str, Any] = {
    "epochs": 4,
    "warmup_epochs": 2,
    "warmup": "linear",
    "decay": "cosine",
    "milestones": (),
    "gamma": 0.1,
    "batch_size": 32,
    "accumulate": 1,
    "lr": None,
    "base_lr": None,
    "base_batch": None,
}
STAGES = (1, 1, 1, 2, 2, 3)
NOTHING: dict[str, Floats] = {name: np.zeros(0) for name in ("stage", "progress", "loss", "lr")}


def rows() -> list[dict[str, Any]]:
    return [
        {"stage": stage, "progress": i / 4, "loss": 1.0 + i, "lr": 0.1 * i, "valid_loss": None}
        for i, stage in enumerate(STAGES)
    ]


def columns(num_rows: int, until: float = 3.0, seed: int = 0) -> dict[str, Floats]:
    random = np.random.default_rng(seed)
    x = until * np.arange(1, num_rows + 1) / num_rows
    loss = 2 * np.exp(-x) + 0.5 + 0.1 * random.random(num_rows)
    return {"stage": np.ones(num_rows), "progress": x, "loss": loss, "lr": np.full(num_rows, 0.05)}


def validations(*losses: float | None) -> list[dict[str, Any]]:
    return [{"progress": i + 1.0, "valid_loss": loss} for i, loss in enumerate(losses)]


def journal(**changes: Any) -> Journal:
    return Journal(FIRST | changes, [0.5])


def line(figure: Figure, panel: int, label: str) -> Any:
    found = [one for one in figure.axes[panel].lines if one.get_label() == label]
    return found[0] if found and len(found[0].get_xdata()) else None


def verticals(figure: Figure, panel: int) -> list[list[float]]:
    return [
        [float(segment[0, 0]) for segment in one.get_segments()]
        for one in figure.axes[panel].collections
        if isinstance(one, LineCollection)
    ]


def texts(figure: Figure, panel: int) -> list[str]:
    return [text.get_text() for text in figure.axes[panel].texts]


def names(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def pixels(picture: bytes) -> Floats:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), np.float64)


def saved(figure: Figure) -> Floats:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return pixels(file.getvalue())


def draw_without_pyplot(path: Path) -> None:
    curves("cifar", rows(), journal(), 1.25).savefig(path)
    live = Curves("cifar")
    live.draw(columns(10), [], journal(), 3.0)
    live.png()
    sys.exit("matplotlib.pyplot" in sys.modules)


def test_a_figure_is_drawn_without_pyplot(tmp_path: Path) -> None:
    assert in_fresh_process(draw_without_pyplot, tmp_path / "curves.png") == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_boundaries_of_stages_are_lines_with_their_numbers() -> None:
    figure = curves("cifar", rows(), journal(), 1.25)
    assert verticals(figure, 0) == verticals(figure, 1) == [[0.5, 1.0]]
    assert texts(figure, 0) == ["stage 2", "stage 3"]


def test_before_the_run_the_whole_curve_is_planned() -> None:
    plan = journal()
    figure = curves("cifar", [], plan, 0.0)
    planned = line(figure, 1, "planned")
    assert planned is not None
    x, y = [list(values) for values in planned.get_data()]
    assert (x[0], x[-1]) == (0.0, 4.0)
    assert y == [plan.rates(p)[0] for p in x]
    assert (y[0], max(y), y[-1]) == (0.005, 0.5, 0.0)
    assert texts(figure, 0) == ["no step yet"]


def test_inside_the_run_the_past_ends_where_the_plan_begins() -> None:
    figure = curves("cifar", rows(), journal(), 1.25)
    past, planned = line(figure, 1, "learning rate"), line(figure, 1, "planned")
    assert past is not None and planned is not None
    assert list(past.get_ydata()) == [row["lr"] for row in rows()]
    assert past.get_xdata()[-1] == planned.get_xdata()[0] == 1.25


def test_after_the_run_nothing_is_planned() -> None:
    assert line(curves("cifar", rows(), journal(), 4.0), 1, "planned") is None


def test_where_a_part_makes_the_rates_none_are_planned_once_it_has_begun() -> None:
    plan = journal(warmup_epochs=0, decay="constant")
    assert line(curves("cifar", rows(), plan, 1.25), 1, "planned") is None
    assert line(curves("cifar", [], plan, 0.0), 1, "planned") is not None


def test_a_fall_at_a_milestone_is_upright() -> None:
    plan = journal(decay="multistep", milestones=(2.7,), warmup_epochs=0)
    planned = line(curves("cifar", [], plan, 0.0), 1, "planned")
    x, y = planned.get_data()
    after = list(x).index(2.7)
    assert x[after] - x[after - 1] < 1e-12
    assert (y[after - 1], y[after]) == (0.5, 0.05)


def test_a_restart_is_upright_and_a_scheduler_of_torchs_is_not_planned() -> None:
    plan = journal(decay="restarts", period=2.3, warmup_epochs=0)
    planned = line(curves("cifar", [], plan, 0.0), 1, "planned")
    x, y = planned.get_data()
    after = list(x).index(2.3)
    assert (y[after - 1], y[after]) == (pytest.approx(0.0, abs=1e-12), 0.5)
    plan.scheduler = "OneCycleLR"
    assert line(curves("cifar", [], plan, 0.0), 1, "planned") is None


def test_a_run_without_end_is_planned_an_epoch_ahead() -> None:
    figure = curves("x", [], journal(epochs=None, decay="constant"), 3.0)
    planned = line(figure, 1, "planned")
    assert planned is not None
    assert planned.get_xdata()[-1] == 4.0
    assert figure.axes[1].get_xlim() == (0.0, 4.0)


def test_edits_are_marked_where_they_were_made_with_what_they_made_it() -> None:
    plan = journal()
    plan.edit(3, 0.75, "hand", lr=0.3, accumulate=8)
    plan.edit(5, 2.0, "hand", warmup_epochs=3)
    figure = curves("x", rows(), plan, 1.25)
    assert verticals(figure, 1) == [[0.5, 1.0], [0.75, 2.0]]
    assert texts(figure, 1) == ["lr 0.3, accumulate 8", "warmup epochs 3"]


def test_of_many_edits_all_are_marked_and_those_are_written_that_have_room() -> None:
    plan = journal()
    for step in range(200):
        plan.edit(step, step / 100, "hand", accumulate=step + 2)
    plan.edit(200, 3.99, "hand", accumulate=999_999)
    figure = curves("x", rows(), plan, 3.99)
    assert len(verticals(figure, 1)[1]) == 201
    assert texts(figure, 1)[-1] == "accumulate 999999"
    assert 4 < len(texts(figure, 1)) < 20
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[1].texts]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_the_validation_is_drawn_where_there_was_a_finite_one() -> None:
    assert line(curves("x", rows(), journal(), 1.25), 0, "validation") is None
    some = rows()
    some[1]["valid_loss"], some[2]["valid_loss"] = math.inf, math.nan
    some[3]["valid_loss"], some[5]["valid_loss"] = 0.7, 0.6
    figure = curves("x", some, journal(), 1.25)
    validation = line(figure, 0, "validation")
    assert validation is not None
    assert [list(values) for values in validation.get_data()] == [[0.75, 1.25], [0.7, 0.6]]
    assert np.isfinite([axes.get_ylim() for axes in figure.axes]).all()


def test_the_running_mean_of_a_constant_is_that_constant_from_the_start() -> None:
    flat = [row | {"loss": 2.0} for row in rows()]
    train = line(curves("x", flat, journal(), 1.25), 0, "train")
    assert train is not None
    assert list(train.get_ydata()) == pytest.approx([2.0] * len(flat), rel=1e-14)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5000])
def test_however_few_steps_there_are_they_can_be_drawn(num_rows: int) -> None:
    live = Curves("x")
    live.draw(columns(num_rows), [], journal(), 3.0 if num_rows else 0.0)
    assert pixels(live.png()).shape == (616, 980, 3)
    for axes in live.figure.axes:
        assert np.isfinite([axes.get_xlim(), axes.get_ylim()]).all()
        assert axes.get_xlim()[0] < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < axes.get_ylim()[1]


def test_the_start_of_a_long_run_is_seen_and_its_whole_plan() -> None:
    live = Curves("x")
    live.draw(columns(3, until=0.01), [], journal(epochs=100), 0.01)
    top, bottom = live.figure.axes
    assert 0.01 < top.get_xlim()[1] < 0.03
    assert bottom.get_xlim() == (0.0, 100.0)
    live.draw(columns(3, until=60.0), [], journal(epochs=100), 60.0)
    assert top.get_xlim() == bottom.get_xlim() == (0.0, 100.0)


def test_a_spike_in_a_long_run_is_drawn() -> None:
    seen = columns(65_536)
    seen["loss"][41_234] = 77.0
    live = Curves("x")
    live.draw(seen, [], journal(), 3.0)
    raw = line(live.figure, 0, "_raw")
    assert 77.0 in raw.get_ydata()
    assert len(raw.get_ydata()) <= 1000
    low, high = live.figure.axes[0].get_ylim()
    assert low < 77.0 <= high


def test_a_live_picture_is_what_a_new_figure_would_show() -> None:
    live, plan = Curves("x"), journal()
    live.draw(columns(3, until=0.1), [], plan, 0.1)
    live.png()
    live.draw(columns(90), validations(1.5, 1.0), plan, 3.0)
    live.png()
    plan.edit(90, 3.0, "hand", accumulate=4)
    seen = columns(100, until=3.3)
    seen["stage"][50:] = 2
    live.draw(seen, validations(1.5, 1.0, 0.7), plan, 3.3)
    fresh = Curves("x")
    fresh.draw(seen, validations(1.5, 1.0, 0.7), plan, 3.3)
    assert live.png() == fresh.png() == live.png()
    # Fewer colours, and lines in another order than a file's: the same to the eye.
    assert np.abs(pixels(live.png()) - saved(fresh.figure)).mean() < 2.0


def test_a_live_picture_draws_its_axes_again_only_when_they_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live, drawn = Curves("x"), []
    draw = live._canvas.draw
    monkeypatch.setattr(live._canvas, "draw", lambda: (drawn.append(1), draw()))
    whole = columns(1020)
    for num_rows in (1000, 1010, 1020):
        live.draw({name: whole[name][:num_rows] for name in whole}, [], journal(), 3.0)
        live.png()
    assert len(drawn) == 1
    live.draw(columns(1020), validations(1.0), journal(), 3.0)
    live.png()
    assert len(drawn) == 2


def test_settings_being_typed_are_previewed_beside_the_plan() -> None:
    plan, live = journal(), Curves("x")
    tried = edited(plan, 1.0, lr=0.9, epochs=8)
    live.draw(columns(100, until=1.0), [], plan, 1.0, tried)
    typed, planned = line(live.figure, 1, "as typed"), line(live.figure, 1, "planned")
    assert typed.get_ydata().max() == pytest.approx(0.9)
    assert planned.get_ydata().max() == pytest.approx(0.5)
    assert (typed.get_xdata()[-1], planned.get_xdata()[-1]) == (8.0, 4.0)
    assert live.figure.axes[1].get_xlim() == (0.0, 8.0)
    assert names(live.figure) == ["train", "learning rate", "planned", "as typed"]
    live.draw(columns(100, until=1.0), [], plan, 1.0)
    assert line(live.figure, 1, "as typed") is None
    assert names(live.figure) == ["train", "learning rate", "planned"]


def test_a_preview_leaves_the_journal_as_it_is_and_refuses_what_the_journal_refuses() -> None:
    plan = journal()
    plan.edit(3, 0.5, "hand", warmup_epochs=3)
    tried = edited(plan, 1.0, lr=0.9)
    assert (tried.peak_lr, tried.settings["warmup_epochs"]) == (0.9, 3)
    assert (plan.peak_lr, len(plan.entries)) == (0.5, 1)
    with pytest.raises(ValueError, match="accumulate=0 must be a whole number"):
        edited(plan, 1.0, accumulate=0)


def test_threads_that_draw_the_same_curves_get_whole_pictures() -> None:
    live, plan = Curves("x"), journal()
    live.draw(columns(500), [], plan, 3.0)
    wanted = live.png()
    found: list[bytes] = []

    def draw() -> None:
        for _ in range(5):
            live.draw(columns(500), [], plan, 3.0)
            found.append(live.png())

    threads = [threading.Thread(target=draw) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 15


def test_what_a_picture_shows_is_not_changed_while_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    live, waited = Curves("x"), []
    live.draw(columns(500), [], journal(), 3.0)
    other = threading.Thread(target=lambda: live.draw(columns(3), [], journal(), 3.0))
    draw = live._canvas.draw

    def drawing() -> None:
        other.start()
        other.join(0.2)
        waited.append(other.is_alive())
        draw()

    monkeypatch.setattr(live._canvas, "draw", drawing)
    live.png()
    other.join()
    assert waited == [True]


def test_a_figure_shows_its_lines_on_a_users_canvas_too() -> None:
    figure = curves("x", rows(), journal(), 1.25)
    wanted = saved(figure)
    figure.canvas.draw()
    assert (np.asarray(figure.canvas.buffer_rgba())[..., :3] == wanted).all()


def test_several_sessions_lie_over_each_other_in_looks_of_their_own() -> None:
    sessions = [
        (f"run-{i}", columns(50, until=1.0 + i, seed=i), validations(*[1.0] * i)) for i in range(8)
    ]
    figure = compared(sessions)
    top, bottom = figure.axes
    named = [one for one in top.lines if not one.get_label().startswith("_")]
    assert [one.get_label() for one in named] == [f"run-{i}" for i in range(8)]
    assert len({(one.get_color(), one.get_linestyle()) for one in named}) == 8
    assert [one.get_color() for one in bottom.lines] == [one.get_color() for one in named]
    assert [len(one.get_xdata()) for one in top.lines if one.get_label() == "_valid"] == list(range(8))
    assert top.get_xlim() == bottom.get_xlim() == (0.0, 8.0)
    legend = [text.get_text() for text in top.get_legend().get_texts()]
    assert legend == [f"run-{i}" for i in range(8)] + ["validation"]
    saved(figure)


def test_sessions_without_a_step_can_be_compared() -> None:
    saved(compared([("new", NOTHING, []), ("old", columns(20), validations(0.9))]))
    saved(compared([("new", NOTHING, [])]))
    saved(compared([]))


def test_the_curves_are_told_in_words() -> None:
    seen = columns(3, until=3.2) | {"loss": np.array([2.0, 2.0, 2.0])}
    assert words(seen, []) == "loss 2 -> 2 over 3.2 epochs, learning rate 0.05"
    assert words(seen, validations(0.9, 0.523)).endswith("epochs, validation 0.523, learning rate 0.05")
    assert words(NOTHING, []) == "no step yet"
