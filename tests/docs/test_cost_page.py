"""The page on cost shows what the cost model says, from small networks to large ones."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import cost_table

from ssm_nn.command_costs import Job


def test_the_tables_of_the_page_are_those_of_the_cost_model():
    page = cost_table.PAGE.read_text(encoding="utf-8")
    assert cost_table.with_tables(page) == page
    for name, lines in cost_table.tables().items():
        assert f"<!-- {name} -->\n\n" + "\n".join(lines) in page


def test_the_page_names_the_rates_of_its_times():
    rates = cost_table.RATES
    words = [f"{rate / 1e9:.3g}" for rate in (rates.product, rates.tall, rates.small)]
    assert f"{words[0]}, {words[1]} and {words[2]} Gflop/s" in cost_table.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("weights", cost_table.SIZES)
def test_the_networks_have_about_the_weights_that_they_stand_for(weights):
    assert Job(cost_table.widths(weights), 1, 1, 1).weights == pytest.approx(weights, rel=0.1)
