"""The REST interface against its own document: whatever is sent, nothing but documented answers come back, and no 5xx."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from service_base import PRODUCT

from gladad.service.app import make_app
from gladad.service.settings import StationSettings

load_all_checks()
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
DOCUMENT = make_app(SimpleNamespace(settings=StationSettings())).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {result.ok().label: result.ok() for result in SCHEMA.get_all_operations()}


@pytest.mark.parametrize("label", OPERATIONS)
def test_whatever_is_sent_is_answered_as_documented(url, label):
    @settings(
        max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(OPERATIONS[label].as_strategy(), st.booleans())
    def check(case, real):
        if real and "product" in case.path_parameters and not label.endswith("/stop"):  # and one that is there
            case.path_parameters["product"] = PRODUCT
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=30)

    check()


def test_everything_is_documented():
    operations = [(path, method, each) for path, methods in DOCUMENT["paths"].items() for method, each in methods.items()]
    assert len(operations) == len(OPERATIONS) > 20
    for path, method, each in operations:
        assert each["description"], (path, method)
        assert any(status.startswith("2") for status in each["responses"])
        if path.startswith("/v1"):
            assert "401" in each["responses"], (path, method)
