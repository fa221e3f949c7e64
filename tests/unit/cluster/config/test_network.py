"""Where ranks speak to each other, said in one place."""

from __future__ import annotations

import pytest

from cluster.config import ConfigError, parse
from cluster.config.network import NetworkSettings, address_of, rank_address, rank_variables


def test_without_a_word_the_nodes_address_is_taken() -> None:
    assert rank_address(NetworkSettings(), "10.0.0.1") == "10.0.0.1"
    assert rank_variables(NetworkSettings()) == {}


def test_a_named_interface_is_used_for_everything() -> None:
    network = NetworkSettings(interface="lo", nccl={"NCCL_IB_HCA": "mlx5_0"})
    assert rank_address(network, "10.0.0.1") == "127.0.0.1"
    assert rank_variables(network) == {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_HCA": "mlx5_0"}


def test_nccl_may_use_another_one() -> None:
    network = NetworkSettings(interface="lo", nccl={"NCCL_SOCKET_IFNAME": "ib0"})
    assert rank_variables(network)["NCCL_SOCKET_IFNAME"] == "ib0"


def test_an_interface_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"cluster\.network\.interface: eth99 does not exist on .*; it has .*lo"):
        address_of("eth99")


def test_only_variables_of_nccl_are_taken() -> None:
    section = parse({"cluster": {"network": {"interface": "eth0", "nccl": {"NCCL_IB_GID_INDEX": 3}}}}).cluster.network
    assert (section.interface, dict(section.nccl)) == ("eth0", {"NCCL_IB_GID_INDEX": 3})
    with pytest.raises(ConfigError, match=r"cluster\.network\.nccl"):
        parse({"cluster": {"network": {"nccl": {"LD_PRELOAD": "x.so"}}}})
