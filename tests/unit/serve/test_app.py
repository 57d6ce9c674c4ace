"""The routes: the shape of /v1/videos, and each way in which a request is refused."""

from __future__ import annotations

import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data.video_writer import write_video
from tests.support.pngs import png_bytes
from tests.support.server import Server

pytestmark = pytest.mark.medium

FRAMES = np.full((5, 64, 64, 3), 128, np.uint8)


def clip(folder: Path, frames: np.ndarray = FRAMES, name: str = "clip.mp4") -> bytes:
    return write_video(folder / name, frames, 16).read_bytes()


def png(width: int = 32, height: int = 32) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(data, "PNG")
    return data.getvalue()


def post(server: Server, path: str = "/v1/videos", files: Any = None, **fields: str) -> Any:
    return server.client.post(path, data={"prompt": "a ball", **fields}, files=files or [("", ("", b""))][:0])


def finish(server: Server, tmp_path: Path) -> None:
    """Do a worker's work: the next job is finished with a clip."""
    job = server.store.claim("w")
    write_video(server.folders.result(job.id), FRAMES, 16)
    server.store.finish(job)


def error_of(response: Any) -> dict[str, str]:
    return response.json()["error"]


def test_video_is_created_polled_and_downloaded(server: Server, tmp_path: Path) -> None:
    made = post(server, size="64x48", seconds="1").json()
    assert (made["object"], made["status"], made["size"], made["seconds"]) == (
        "video",
        "queued",
        "64x48",
        "1.0625",
    )
    finish(server, tmp_path)
    seen = server.client.get(f"/v1/videos/{made['id']}").json()
    assert (seen["status"], seen["progress"]) == ("completed", 100)
    content = server.client.get(f"/v1/videos/{made['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert content.content[4:8] == b"ftyp"


@pytest.mark.parametrize(("variant", "kind"), [("thumbnail", "WEBP"), ("spritesheet", "JPEG")])
def test_finished_video_has_pictures(server: Server, tmp_path: Path, variant: str, kind: str) -> None:
    made = post(server).json()
    finish(server, tmp_path)
    content = server.client.get(f"/v1/videos/{made['id']}/content", params={"variant": variant})
    assert Image.open(io.BytesIO(content.content)).format == kind


def test_defaults_of_the_servers_json_match_a_request(server: Server) -> None:
    assert post(server).json()["size"] == "64x64"


def test_json_body_and_form_say_the_same(server: Server) -> None:
    form = post(server, seed="7", num_inference_steps="4").json()["request"]
    body = {"prompt": "a ball", "seed": 7, "num_inference_steps": 4}
    assert server.client.post("/v1/videos", json=body).json()["request"] == form


def test_extra_params_are_fields_too(server: Server) -> None:
    request = post(server, extra_params='{"context_scale": 0.5, "steps": 3}', steps="9").json()["request"]
    assert (request["context_scale"], request["steps"]) == (0.5, 9)


def test_uploads_are_kept_under_names_of_ours(server: Server, tmp_path: Path) -> None:
    files = [
        ("src_video", ("../../evil.mp4", clip(tmp_path))),
        ("src_ref_images[]", ("a.png", png())),
        ("src_ref_images[]", ("b.exe", png())),
    ]
    made = post(server, files=files).json()
    kept = sorted(path.name for path in (server.folders.of(made["id"]) / "inputs").iterdir())
    assert kept == ["src_ref_images_0.png", "src_ref_images_1.png", "src_video_0.mp4"]


def test_input_reference_is_a_first_frame_or_a_clip(server: Server, tmp_path: Path) -> None:
    image = post(server, files=[("input_reference", ("x", png()))]).json()["request"]
    video = post(server, files=[("input_reference", ("x", clip(tmp_path)))]).json()["request"]
    assert image["first_frame"] == ["first_frame_0.png"]
    assert video["src_video"] == ["src_video_0.mp4"]


@pytest.mark.parametrize(
    ("fields", "where", "fact"),
    [
        ({"stepz": "3"}, "stepz", "steps"),
        ({"steps": "0"}, "steps", "more than 0"),
        ({"overlap": "1"}, "overlap", "unknown"),
        ({"prompt": "x" * 20_001}, "prompt", "20000"),
        ({"video_path": "/etc/passwd"}, "video_path", "unknown"),
        ({"name": "x"}, "name", "unknown"),
        ({"size": "64"}, "size", "832x480"),
        ({"size": "64x64", "width": "64"}, "size", "width"),
        ({"seconds": "soon"}, "seconds", "soon"),
        ({"seconds": "1", "num_frames": "17"}, "seconds", "num_frames"),
        ({"model": "sora-2"}, "model", "tiny"),
        ({"steps": "3", "num_inference_steps": "3"}, "num_inference_steps", "steps"),
        ({"extra_params": "[]"}, "extra_params", "object"),
        ({"prompt": " "}, "prompt", "missing"),
        ({"prompt": "a\0b"}, "prompt", "NUL"),
        ({"negative_prompt": "\0"}, "negative_prompt", "NUL"),
        ({"task": '{"type": "gray", "caption": "a\\u0000"}'}, "task", "NUL"),
        ({"src_video": "/etc/passwd"}, "src_video", "file"),
        ({"num_frames": "10001", "size": "16384x16384"}, "size", "fewer"),
    ],
)
def test_wrong_field_is_rejected_by_name(
    server: Server, fields: dict[str, str], where: str, fact: str
) -> None:
    response = post(server, **fields)
    assert response.status_code == 400
    assert error_of(response).get("where") == where
    assert fact in error_of(response)["message"]
    assert list(server.folders.root.glob("*")) == []


@pytest.mark.parametrize("value", [True, False, [1], {}])
def test_seconds_of_another_kind_are_rejected(server: Server, value: Any) -> None:
    response = server.client.post("/v1/videos", json={"prompt": "a ball", "seconds": value})
    assert response.status_code == 400
    assert error_of(response)["where"] == "seconds"


@pytest.mark.parametrize(
    ("slot", "content", "status"),
    [
        ("src_video", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", 415),
        ("src_video", b"ffconcat version 1.0\nfile /etc/passwd\n", 415),
        ("src_video", b"<?xml version='1.0'?><MPD/>", 415),
        ("src_video", png(), 415),
        ("src_video", b"\0\0\0\x18ftypmp42" + b"\0" * 500, 400),
        ("src_video", b"", 400),
        ("src_ref_images", b"GIF89a" + b"\0" * 50, 415),
        ("src_ref_images", png()[:60], 400),
        ("src_ref_images", png_bytes(cut_at=10), 400),
        ("src_mask", png_bytes(cut_at=10), 400),
        ("src_ref_images", png_bytes(left_out=1), 400),
        ("first_frame", png_bytes(left_out=9), 400),
        ("nonsense", png(), 400),
    ],
)
def test_file_that_is_not_what_it_says_is_rejected(
    server: Server, slot: str, content: bytes, status: int
) -> None:
    response = post(server, files=[(slot, ("clip.mp4", content))])
    assert response.status_code == status
    assert error_of(response)["where"] == slot
    assert str(server.folders.root) not in response.text
    assert list(server.folders.root.glob("*")) == []


def test_task_is_a_name_or_an_object_with_options(server: Server, tmp_path: Path) -> None:
    files = [("src_video", ("c", clip(tmp_path)))]
    assert post(server, files=files, task="gray").json()["request"]["task"] == "gray"
    options = '{"type": "outpainting", "direction": "left", "expand_ratio": 0.5}'
    made = post(server, files=files, task=options).json()
    assert made["request"]["task"]["expand_ratio"] == 0.5
    unknown = post(server, files=files, task="grey")
    assert (unknown.status_code, "gray" in error_of(unknown)["message"]) == (400, True)


@pytest.mark.parametrize(
    "shape", [dict, json.dumps, lambda task: json.dumps(json.dumps(task))], ids=["object", "text", "twice"]
)
@pytest.mark.parametrize(
    ("task", "name"),
    [
        ({"type": "inpainting", "mode": "mask", "mask": "/etc/passwd"}, "mask"),
        ({"type": "depth", "annotators": "/etc"}, "annotators"),
        ({"type": "composition", "video_1": "/etc/passwd"}, "video_1"),
        ({"type": "swap_anything", "mask": ["/etc/passwd"]}, "mask"),
    ],
)
def test_task_takes_no_path(
    server: Server, tmp_path: Path, shape: Any, task: dict[str, Any], name: str
) -> None:
    upload = [("src_video", ("c", clip(tmp_path)))]
    given = shape(task)
    made = [post(server, files=upload, extra_params=json.dumps({"task": given}))]
    made.append(server.client.post("/v1/videos", json={"prompt": "a ball", "task": given}))
    if isinstance(given, str):
        made.append(post(server, files=upload, task=given))
    for refused in made:
        assert refused.status_code == 400, refused.text
        assert "/etc" not in refused.text or "task" in error_of(refused)["where"]
    assert list(server.folders.root.glob("*")) == []


def test_long_json_is_rejected_before_it_is_parsed(server: Server) -> None:
    body = b"[" + b"[]," * 400_000 + b"[]]"
    refused = server.client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert (refused.status_code, error_of(refused)["code"]) == (413, "too_large")


def test_file_that_is_missing_answers_404(server: Server, tmp_path: Path) -> None:
    made = post(server).json()
    finish(server, tmp_path)
    server.folders.result(made["id"]).unlink()
    for variant in ("video", "thumbnail", "sheet"):
        gone = server.client.get(f"/v1/videos/{made['id']}/content", params={"variant": variant})
        assert gone.status_code == 404
    assert post(server, "/v1/videos/edits", video=made["id"]).status_code == 404


def test_sheet_that_is_missing_answers_404(server: Server, tmp_path: Path) -> None:
    made = post(server).json()
    finish(server, tmp_path)
    gone = server.client.get(f"/v1/videos/{made['id']}/content", params={"variant": "sheet"})
    assert (gone.status_code, error_of(gone)["code"]) == (404, "not_found")


def test_file_in_a_json_is_rejected_by_name(server: Server) -> None:
    refused = server.client.post("/v1/videos", json={"prompt": "a ball", "src_video": "clip.mp4"})
    assert (refused.status_code, error_of(refused)["where"]) == (400, "src_video")
    assert "multipart/form-data" in error_of(refused)["fix"]


def test_json_that_is_not_utf8_is_rejected(server: Server) -> None:
    body = '{"prompt": "\u00e9"}'.encode("latin-1")
    refused = server.client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_json")


def test_examples_of_openapi_are_requests(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    content = paths["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]
    assert content["examples"].keys() == {"short", "long"}
    for example in content["examples"].values():
        assert server.client.post("/v1/videos", json=example["value"]).status_code == 200


def test_deeply_nested_video_id_is_rejected(server: Server) -> None:
    assert post(server, "/v1/videos/edits", video='{"a":' * 5000).status_code == 404


def test_mask_without_a_clip_is_rejected_in_the_apis_words(server: Server) -> None:
    response = post(server, files=[("src_mask", ("m.png", png()))])
    assert "src_mask" in error_of(response)["message"]
    assert "mask_path" not in response.text


def test_limits_of_uploads_are_kept(tmp_path: Path) -> None:
    made = Server(tmp_path / "data", max_files=1, max_clip_pixels=1000, max_clip_seconds=0.1, max_upload_mb=1)
    with made.client:
        image = ("src_ref_images", ("a.png", png(64, 64)))
        assert error_of(post(made, files=[image]))["code"] == "too_many_pixels"
        many = post(made, files=[image, image])
        assert (many.status_code, error_of(many)["code"]) == (413, "too_many_files")
        small = clip(tmp_path, np.full((9, 16, 16, 3), 9, np.uint8))
        assert error_of(post(made, files=[("src_video", ("c", small))]))["code"] == "too_long"
        big = post(made, files=[("src_video", ("c", b"\0" * (2 << 20)))])
        assert (big.status_code, error_of(big)["code"]) == (413, "too_large")


def test_body_without_a_length_is_cut_at_the_limit(tmp_path: Path) -> None:
    made = Server(tmp_path, max_upload_mb=1)
    with made.client:
        sent = made.client.post(
            "/v1/videos",
            content=(b"x" * 65536 for _ in range(100)),
            headers={"content-type": "application/json"},
        )
        assert sent.status_code == 413


def test_full_queue_answers_429(tmp_path: Path) -> None:
    made = Server(tmp_path, max_queue=1)
    with made.client:
        assert post(made).status_code == 200
        refused = post(made)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
        assert len(list(made.folders.root.iterdir())) == 1


def test_loading_model_answers_503_with_retry_after(server: Server) -> None:
    server.engine.loaded = False
    refused = post(server)
    assert (refused.status_code, error_of(refused)["code"]) == (503, "model_loading")
    assert "retry-after" in refused.headers
    assert server.client.get("/ready").status_code == 503
    assert server.client.get("/health").status_code == 200


def test_deleting_a_video_deletes_its_inputs(server: Server) -> None:
    made = post(server, files=[("src_ref_images", ("a", png()))]).json()
    assert server.client.delete(f"/v1/videos/{made['id']}").json()["deleted"] is True
    assert not server.folders.of(made["id"]).exists()
    assert server.client.get(f"/v1/videos/{made['id']}").status_code == 404
    assert server.client.delete(f"/v1/videos/{made['id']}").status_code == 404


def test_unfinished_video_has_no_content(server: Server) -> None:
    made = post(server).json()
    refused = server.client.get(f"/v1/videos/{made['id']}/content")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "video_queued")


@pytest.mark.parametrize("video_id", ["nope", "..%2F..%2Fetc", "video_" + "0" * 24])
def test_unknown_id_answers_404(server: Server, video_id: str) -> None:
    assert server.client.get(f"/v1/videos/{video_id}/content").status_code == 404


def test_list_is_paged_newest_first(server: Server) -> None:
    ids = [post(server, seed=str(n)).json()["id"] for n in range(3)]
    first = server.client.get("/v1/videos", params={"limit": 2}).json()
    assert [each["id"] for each in first["data"]] == [ids[2], ids[1]]
    assert first["has_more"] is True
    rest = server.client.get("/v1/videos", params={"limit": 2, "after": first["last_id"]}).json()
    assert [each["id"] for each in rest["data"]] == [ids[0]]
    assert rest["has_more"] is False
    oldest = server.client.get("/v1/videos", params={"order": "asc"}).json()
    assert [each["id"] for each in oldest["data"]] == ids


def test_remix_keeps_inputs_and_numbers(server: Server, tmp_path: Path) -> None:
    made = post(server, files=[("src_video", ("c", clip(tmp_path)))], seed="5", short_clip="pad").json()
    again = server.client.post(f"/v1/videos/{made['id']}/remix", json={"prompt": "a cube"}).json()
    assert again["remixed_from_video_id"] == made["id"]
    assert again["request"] == {**made["request"], "prompt": "a cube"}
    assert (server.folders.of(again["id"]) / "inputs/src_video_0.mp4").exists()


def test_edit_starts_from_a_finished_video(server: Server, tmp_path: Path) -> None:
    made = post(server).json()
    refused = post(server, "/v1/videos/edits", video=made["id"])
    assert refused.status_code == 409
    finish(server, tmp_path)
    edited = server.client.post("/v1/videos/edits", json={"prompt": "snow", "video": {"id": made["id"]}})
    assert edited.json()["request"]["src_video"] == ["src_video_0.mp4"]


def test_extension_begins_with_the_end_of_a_video(server: Server, tmp_path: Path) -> None:
    made = post(server).json()
    finish(server, tmp_path)
    longer = post(server, "/v1/videos/extensions", video=made["id"], overlap_frames="5").json()
    assert longer["request"]["first_frame"] == ["first_frame_0.mkv"]
    too_long = post(server, "/v1/videos/extensions", video=made["id"], overlap_frames="17")
    assert error_of(too_long)["where"] == "overlap_frames"
    refused = post(server, "/v1/videos/extensions", video=made["id"], overlap_frames="4")
    assert error_of(refused)["where"] == "overlap_frames"
    assert error_of(post(server, "/v1/videos/extensions"))["where"] == "video"


def test_metrics_count_videos_by_status(server: Server, tmp_path: Path) -> None:
    post(server)
    post(server)
    finish(server, tmp_path)
    text = server.client.get("/metrics").text
    assert 'vace_videos{status="completed"} 1.0' in text
    assert 'vace_videos{status="queued"} 1.0' in text
    assert "vace_ready 1.0" in text


def test_openapi_names_every_upload_and_field(server: Server) -> None:
    described = server.client.get("/openapi.json").json()["paths"]["/v1/videos"]["post"]
    form = described["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert {
        "src_video",
        "src_mask",
        "src_ref_images",
        "context_scale",
        "size",
        "num_inference_steps",
    } <= form.keys()
    assert not {"video_path", "mask_path", "name"} & form.keys()


def test_request_names_loras_of_the_servers_folder(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "style.safetensors").write_bytes(b"")
    made = Server(tmp_path / "data", loras_dir=str(folder))
    with made.client:
        loras = [{"path": "style.safetensors", "strength": 0.5}]
        video = post(made, loras=json.dumps(loras)).json()
        assert video["request"]["loras"] == [{"path": "style.safetensors", "strength": 0.5}]
        request = json.loads((made.folders.of(video["id"]) / "request.json").read_text())
        assert request["loras"][0]["path"] == str(folder / "style.safetensors")
        assert made.client.get("/v1/models").json()["data"][0]["loras"] == ["style.safetensors"]
        for name in ("styl.safetensors", "../data/queue.sqlite3", str(folder / "style.safetensors"), ""):
            refused = post(made, loras=json.dumps([{"path": name}]))
            assert refused.status_code == 400
            assert "loras" in error_of(refused)["where"]


def test_request_names_no_lora_without_a_folder(server: Server) -> None:
    refused = post(server, loras="style.safetensors")
    assert refused.status_code == 400


def test_long_video_is_a_request(server: Server) -> None:
    fields = {"num_frames": "29", "window": "17", "window_overlap": "5"}
    made = post(server, **fields, window_prompts='["a", "b"]').json()
    assert made["request"]["window_prompts"] == ["a", "b"]
    refused = post(server, **{**fields, "window_overlap": "17"})
    assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_request")
    assert "window_overlap" in error_of(refused)["message"]


def test_damaged_queue_takes_no_more_videos(server: Server) -> None:
    server.engine.damage = "queue.sqlite3 is damaged"
    refused = post(server)
    assert (refused.status_code, error_of(refused)["code"]) == (503, "queue_damaged")
    assert "retry-after" in refused.headers


def test_error_of_the_queue_answers_503(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def malformed(_: str) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(server.store, "get", malformed)
    refused = server.client.get("/v1/videos/video_1")
    assert (refused.status_code, error_of(refused)["code"]) == (503, "queue_failed")
    assert "retry-after" in refused.headers


def test_request_is_remarked_on_in_the_answer(server: Server, tmp_path: Path) -> None:
    files = [("src_video", ("c", clip(tmp_path))), ("src_mask", ("m", png_bytes(8)))]
    black = io.BytesIO()
    Image.new("L", (8, 8)).save(black, "PNG")
    files[1] = ("src_mask", ("m", black.getvalue()))
    made = post(server, files=files, short_clip="pad", preset="lightx2v-4step").json()
    (preset, mask) = made["notes"]
    assert preset.startswith("preset lightx2v-4step")
    assert mask.startswith("src_mask: white nowhere")
    assert post(server).json()["notes"] == []
    job = server.store.claim("w")
    server.store.add_notes(job, [*job.notes, "src_video: resized"])
    seen = server.client.get(f"/v1/videos/{made['id']}").json()
    assert seen["notes"] == [preset, mask, "src_video: resized"]
    assert seen["request"] == made["request"]
    assert server.client.get("/v1/videos").json()["data"][1]["notes"] == seen["notes"]
