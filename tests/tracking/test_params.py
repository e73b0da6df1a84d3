"""A configuration as MLflow's params."""

from okddip.tracking.params import flatten


def test_params_are_written_as_overrides() -> None:
    config = {
        "method": {"peers": 4, "teacher": None, "temperature": 3.0},
        "scheduler": {"milestones": [150, 0.5], "options": {}},
        "trainer": {"compile": False, "devices": [None, {"kind": True}]},
    }
    assert flatten(config) == {
        "method.peers": "4",
        "method.teacher": "null",
        "method.temperature": "3",
        "scheduler.milestones": "[150,0.5]",
        "scheduler.options": "{}",
        "trainer.compile": "false",
        "trainer.devices": "[null,{kind:true}]",
    }
    assert flatten(flatten(config)) == flatten(config)
