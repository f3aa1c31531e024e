package install

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDocker(t *testing.T) {
	for _, tt := range []struct{ before, after string }{
		{"", "{\n  \"features\": {\"containerd-snapshotter\": true},\n  \"storage-driver\": \"varve\"\n}\n"},
		{"{}", "{\n  \"features\": {\"containerd-snapshotter\": true},\n  \"storage-driver\": \"varve\"\n}\n"},
		{"{\n  \"log-driver\": \"journald\"\n}\n", "{\n  \"features\": {\"containerd-snapshotter\": true},\n  \"storage-driver\": \"varve\",\n  \"log-driver\": \"journald\"\n}\n"},
		{`{"a": {}, "features": {}}`, "{\n  \"storage-driver\": \"varve\",\"a\": {}, \"features\": {\"containerd-snapshotter\": true}}"},
		{`{"features": {"buildkit": true}, "storage-driver": "varve"}`, `{"features": {"containerd-snapshotter": true, "buildkit": true}, "storage-driver": "varve"}`},
		{`{"storage-driver":"varve","features":{"containerd-snapshotter":true}}`, `{"storage-driver":"varve","features":{"containerd-snapshotter":true}}`},
	} {
		m := newMachine(t, nil)
		if tt.before != "" {
			m.put(dockerConfig, tt.before)
		} else {
			must(t, os.MkdirAll(m.dir+"/etc/docker", 0o755))
		}
		before := m.tree()
		d := &Docker{Node: m.node(false), Name: "varve"}
		do := func(plan func(context.Context) (Changes, error)) []string {
			t.Helper()
			cs, err := plan(context.Background())
			must(t, err)
			said, err := d.Do(context.Background(), cs)
			must(t, err)
			return said
		}
		do(d.PlanInstall)
		got := m.get(dockerConfig)
		if diff := cmp.Diff(tt.after, got); diff != "" || !json.Valid([]byte(got)) {
			t.Errorf("%q (-want +got):\n%s", tt.before, diff)
		}
		if said := do(d.PlanInstall); len(said) > 0 {
			t.Errorf("a second time: %q", said)
		}
		if tt.before == tt.after {
			continue // the user's own
		}
		do(d.PlanUninstall)
		if now := m.tree(); now != before {
			t.Errorf("left:\n%s\nit was:\n%s", now, before)
		}
	}
}

// TestDockerEdited takes its keys back where others have written since.
func TestDockerEdited(t *testing.T) {
	m := newMachine(t, map[string]string{dockerConfig: "{\n  \"log-driver\": \"journald\"\n}\n"})
	d := &Docker{Node: m.node(false), Name: "varve"}
	cs, err := d.PlanInstall(context.Background())
	must(t, err)
	_, err = d.Do(context.Background(), cs)
	must(t, err)
	whole := m.get(dockerConfig)
	m.put(dockerConfig, strings.Replace(whole, "journald", "local", 1))
	cs, err = d.PlanUninstall(context.Background())
	must(t, err)
	_, err = d.Do(context.Background(), cs)
	must(t, err)
	if got := m.get(dockerConfig); got != "{\n  \"log-driver\": \"local\"\n}\n" {
		t.Errorf("left: %s", got)
	}
	m.put(dockerConfig, `{ "storage-driver" : "varve" }`)
	m.refuses("by hand", func() error { _, err := d.PlanUninstall(context.Background()); return err })
}

func TestDockerRefused(t *testing.T) {
	for text, want := range map[string]string{
		`{"log-driver": }`:               "invalid character",
		`["x"]`:                          "not an object",
		`{"storage-driver": "overlay2"}`: "sets storage-driver",
		`{"features": {"containerd-snapshotter": false}}`: "sets features.containerd-snapshotter to false",
		`{"features": 3}`: "features: it is not an object",
		`{"features": {"containerd-snapshotter": true}, "storage-driver": "zfs"}`: "sets storage-driver",
		`{"storage-driver": "varve", "storage-driver": "varve"}`:                  "duplicate",
	} {
		m := newMachine(t, map[string]string{dockerConfig: text})
		d := &Docker{Node: m.node(false), Name: "varve"}
		m.refuses(want, func() error { _, err := d.PlanInstall(context.Background()); return err })
	}
}
