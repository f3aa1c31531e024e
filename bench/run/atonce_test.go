package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/bench/link"
)

func TestTwice(t *testing.T) {
	get := func(path, by string, n int64) link.Request {
		return link.Request{Class: link.Blob, Method: "GET", Path: path, Range: by, Status: 206, Bytes: n}
	}
	whole := get("/v2/a/blobs/sha256:1", "", 100)
	whole.Status = 200
	refused, head := whole, whole
	refused.Status, head.Method = 404, "HEAD"
	manifest := whole
	manifest.Class = link.Manifest
	for _, c := range []struct {
		name string
		log  []link.Request
		want int64
	}{
		{"nothing", nil, 0},
		{"side by side", []link.Request{get("/x/1", "bytes=10-19", 10), get("/x/1", "bytes=0-9", 10)}, 0},
		{"other blobs", []link.Request{get("/x/1", "bytes=0-9", 10), get("/x/2", "bytes=0-9", 10)}, 0},
		{"the same from elsewhere", []link.Request{get("/x/1", "bytes=0-9", 10), get("/y/1", "bytes=0-9", 10)}, 10},
		{"a part", []link.Request{get("/x/1", "bytes=0-9", 10), get("/x/1", "bytes=5-14", 10)}, 5},
		{"three times", []link.Request{get("/x/1", "bytes=0-9", 10), get("/x/1", "bytes=0-9", 10), get("/x/1", "bytes=0-9", 10)}, 20},
		{"within a longer one", []link.Request{get("/x/1", "bytes=0-99", 100), get("/x/1", "bytes=10-19", 10), get("/x/1", "bytes=30-39", 10)}, 20},
		{"broken off, then gone on with", []link.Request{get("/x/1", "bytes=0-99", 40), get("/x/1", "bytes=40-99", 60)}, 0},
		{"whole", []link.Request{whole, get(whole.Path, "bytes=90-99", 10)}, 10},
		{"no bodies of blobs", []link.Request{whole, refused, head, manifest}, 0},
	} {
		got, err := twice(c.log)
		if err != nil || got != c.want {
			t.Errorf("%s: %d, %v, want %d", c.name, got, err, c.want)
		}
	}
	if n, err := twice([]link.Request{get("/x/1", "bytes=-10", 10)}); err == nil {
		t.Errorf("a range from the end counts as %d", n)
	}
}

func TestMountedBelow(t *testing.T) {
	const info = `22 1 8:1 / / rw - ext4 /dev/root rw
30 22 0:40 / /root-a/run/data rw,nosuid shared:1 - fuse.varve varve rw,user_id=0
31 22 0:41 / /root-a/run/lower/containerd-1 ro,relatime - erofs none ro
32 22 0:42 / /root-a/run/lower/containerd-2 ro,relatime shared:7 master:2 - erofs none ro
33 22 0:43 / /root-a/run/mnt/other ro - fuse varve ro
34 22 0:44 / /root-a/run/lower/containerd-2/below rw - tmpfs tmpfs rw
35 22 0:45 / /root-ab/run/lower/containerd-3 ro - erofs none ro
36 22 0:46 / /elsewhere rw - fusectl fusectl rw
`
	if d := cmp.Diff(mounted{lower: 2, fuse: 2, erofs: 2}, mountedBelow(info, "/root-a"), cmp.AllowUnexported(mounted{})); d != "" {
		t.Errorf("mounts (-want +got):\n%s", d)
	}
}
