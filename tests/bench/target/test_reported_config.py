from collections.abc import Callable

from bench.target import Target
from bench.target.reported_config import config_labels, resolved_configuration
from bench.target.server import ServerProcess

PAGE = """# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",cpu_offload_gb="None",engine="0",num_gpu_blocks="2048"} 1.0
vllm:num_requests_running{engine="0",model_name="m"} 3.0
redline:engine_config_info{device="cpu (2 threads, \\"x\\")",dtype="bfloat16",model_name="m"} 1.0
vllm:lora_config_info{api_key="sk-1",max_loras="4"} 1.0
"""


def test_labels_of_configuration_metrics_alone_are_read() -> None:
    assert config_labels(PAGE) == {
        "block_size": "16",
        "cache_dtype": "auto",
        "num_gpu_blocks": "2048",
        "device": 'cpu (2 threads, \\"x\\")',
        "dtype": "bfloat16",
        "max_loras": "4",
    }
    assert config_labels("") == {}


def test_what_a_server_tells_is_kept_and_what_it_lacks_left_out(queue_server: Callable[..., ServerProcess]) -> None:
    server = queue_server()
    assert resolved_configuration(server.base_url) == {"max_model_len": 4096, "vocab_size": 1000}
    assert resolved_configuration(Target(server.base_url + "/v1/", api_key="key")) == {
        "max_model_len": 4096,
        "vocab_size": 1000,
    }


def test_a_server_that_is_gone_tells_nothing() -> None:
    assert resolved_configuration("http://127.0.0.1:9", timeout_s=1.0) == {}
