package commit

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/image"
)

func diffIDsOf(n int) string {
	var ids []string
	for i := range n {
		ids = append(ids, fmt.Sprintf("%q", digest.FromString(fmt.Sprint("diff ", i))))
	}
	return `{"type":"layers","diff_ids":[` + strings.Join(ids, ",") + `]}`
}

// What no commit changes is there byte for byte, and where it was.
func TestUnknownFieldsAreKept(t *testing.T) {
	const base = `{
  "architecture": "arm64", "variant" : "v8", "os":"linux", "os.features":["x"],
  "moby.buildkit.cache.v0": "e30=", "com.example": { "<html>" :  "&\u0026", "n": 1e400, "big": 123456789012345678901234567890 },
  "container_config": {"Hostname":"h", "Cmd": ["/bin/sh"]},
  "config": { "ArgsEscaped": true, "Healthcheck": {"Test": [ "CMD", "x"], "Interval": 30000000000 }, "OnBuild": null, "Memory": 5, "Shell":["/bin/sh" ,"-c"]},
  "created": "2020-01-02T03:04:05.678Z", "author": "the base's", "docker_version": "18.06",
  "history": [ {"created":"2019-01-01T00:00:00Z", "created_by":"a \u003c b", "later": {"x": 1}} ],
  "rootfs": ROOT
}`
	raw := strings.Replace(base, "ROOT", strings.Replace(diffIDsOf(1), "{", `{"later": [ 1 ],`, 1), 1)
	b := testBase(t, false, raw, gzipLayer(0))
	_, got, err := Image(b, []byte(raw), layerDesc(9), Meta{Created: time.Unix(1700000000, 0), Comment: "<m>", CreatedBy: "varve commit"})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"architecture":"arm64","variant":"v8","os":"linux","os.features":["x"],` +
		`"moby.buildkit.cache.v0":"e30=","com.example":{ "<html>" :  "&\u0026", "n": 1e400, "big": 123456789012345678901234567890 },` +
		`"container_config":{"Hostname":"h", "Cmd": ["/bin/sh"]},` +
		`"config":{ "ArgsEscaped": true, "Healthcheck": {"Test": [ "CMD", "x"], "Interval": 30000000000 }, "OnBuild": null, "Memory": 5, "Shell":["/bin/sh" ,"-c"]},` +
		`"created":"2023-11-14T22:13:20Z","author":"the base's","docker_version":"18.06",` +
		`"history":[{"created":"2019-01-01T00:00:00Z", "created_by":"a \u003c b", "later": {"x": 1}},{"created":"2023-11-14T22:13:20Z","created_by":"varve commit","comment":"<m>"}],` +
		`"rootfs":{"later":[ 1 ],"type":"layers","diff_ids":["` + string(digest.FromString("diff 0")) + `","` + string(digest.FromString("diff 9")) + `"]}}`
	if d := cmp.Diff(want, string(got)); d != "" {
		t.Error(d)
	}
}

func TestAuthor(t *testing.T) {
	const raw = `{"author":"base","rootfs":{"type":"layers","diff_ids":[]}}`
	b := testBase(t, false, raw)
	for author, want := range map[string][2]string{"": {"base", ""}, "me <a@b>": {"me <a@b>", "me <a@b>"}} {
		_, got, err := Image(b, []byte(raw), layerDesc(1), Meta{Author: author})
		if err != nil {
			t.Fatal(err)
		}
		c, err := image.ParseConfig(got)
		if err != nil || c.Author != want[0] || c.History[0].Author != want[1] {
			t.Errorf("%q: %s, %v", author, got, err)
		}
	}
}

// The history always has an entry for each layer, as every tool that counts
// along it takes for granted.
func TestHistory(t *testing.T) {
	const created = `"created":"2020-01-01T00:00:00Z",`
	for _, tt := range []struct {
		name    string
		layers  int
		history string // of the base, with its key; or nothing
		empty   bool
		squash  int
		want    string // created_by of all entries, E: empty, N: neutral
	}{
		{name: "whole", layers: 2, history: `"history":[{"created_by":"a"},{"created_by":"b","empty_layer":true},{"created_by":"c"}],`, want: "a bE c new"},
		{name: "no change", layers: 1, history: `"history":[{"created_by":"a"}],`, empty: true, want: "a newE"},
		{name: "scratch", want: "new"},
		{name: "scratch, no change", empty: true, want: "newE"},
		{name: "absent", layers: 2, want: "N N new"},
		{name: "null", layers: 2, history: `"history":null,`, want: "N N new"},
		{name: "empty", layers: 2, history: `"history":[],`, empty: true, want: "N N newE"},
		{name: "too short", layers: 3, history: `"history":[{"created_by":"a"},{"created_by":"b","empty_layer":true}],`, want: "a bE N N new"},
		{name: "too long", layers: 1, history: `"history":[{"created_by":"a"},{"created_by":"b"},{"created_by":"c","empty_layer":false}],`, want: "a bE cE new"},
		{name: "null entry", layers: 1, history: `"history":[null],`, want: "N new"},
		{name: "null entry too many", history: `"history":[null],`, want: "E new"},
		{name: "key of another case", layers: 1, history: `"History":[{"Created_By":"a","EMPTY_LAYER":false}],`, want: "a new"},
		{name: "key twice", layers: 1, history: `"history":[{"empty_layer":true}],"history":[{"created_by":"a"}],`, want: "a new"},
		{name: "squash all", layers: 2, history: `"history":[{"created_by":"a"},{"created_by":"b","empty_layer":true},{"created_by":"c"}],`, squash: 2, want: "bE new"},
		{name: "squash one", layers: 2, history: `"history":[{"created_by":"a"},{"created_by":"b"},{"created_by":"c","empty_layer":true}],`, squash: 1, want: "a cE new"},
		{name: "squash to nothing", layers: 2, history: `"history":[{"created_by":"a"},{"created_by":"b"}],`, squash: 2, empty: true, want: "newE"},
		{name: "squash, too short", layers: 3, history: `"history":[{"created_by":"a"}],`, squash: 1, want: "a N new"},
		{name: "squash, too long", layers: 2, history: `"history":[{"created_by":"a"},{"created_by":"b"},{"created_by":"c"}],`, squash: 1, want: "a cE new"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			raw := `{` + created + tt.history + `"rootfs":` + diffIDsOf(tt.layers) + `}`
			var layers []string
			for i := range tt.layers {
				layers = append(layers, gzipLayer(i))
			}
			layer := layerDesc(9)
			if tt.empty {
				layer = nil
			}
			m, got, err := Image(testBase(t, false, raw, layers...), []byte(raw), layer, Meta{CreatedBy: "new", Squash: tt.squash})
			if err != nil {
				t.Fatal(err)
			}
			checkImage(t, m, got)
			c, err := image.ParseConfig(got)
			if err != nil {
				t.Fatal(err)
			}
			var words []string
			for _, h := range c.History {
				w := h.CreatedBy
				switch {
				case h.EmptyLayer:
					w += "E"
				case w == "":
					w = "N"
				}
				words = append(words, w)
			}
			if d := cmp.Diff(tt.want, strings.Join(words, " ")); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestNeutralEntryHasTheBasesTime(t *testing.T) {
	for created, want := range map[string]string{`"created":"2020-01-01T00:00:00Z",`: `{"created":"2020-01-01T00:00:00Z"}`, "": `{}`, `"created":null,`: `{}`} {
		raw := `{` + created + `"rootfs":` + diffIDsOf(1) + `}`
		_, got, err := Image(testBase(t, false, raw, gzipLayer(0)), []byte(raw), nil, Meta{})
		if err != nil || !strings.Contains(string(got), `"history":[`+want+`,{"empty_layer":true}]`) {
			t.Errorf("%s, %v", got, err)
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	for name, raw := range map[string]string{
		"fewer diffIDs":  `{"rootfs":` + diffIDsOf(1) + `}`,
		"more diffIDs":   `{"rootfs":` + diffIDsOf(3) + `}`,
		"no rootfs":      `{}`,
		"not JSON":       `{`,
		"a list":         `[]`,
		"history":        `{"history":{},"rootfs":` + diffIDsOf(2) + `}`,
		"history entry":  `{"history":[1],"rootfs":` + diffIDsOf(2) + `}`,
		"type of rootfs": `{"rootfs":{"type":"other"}}`,
	} {
		if _, got, err := Image(testBase(t, false, raw, gzipLayer(0), gzipLayer(1)), []byte(raw), layerDesc(9), Meta{}); err == nil {
			t.Errorf("%s: %s", name, got)
		}
	}
	// A config grows over the limit.
	raw := `{"x":"` + strings.Repeat("x", image.MaxConfig-100) + `","rootfs":` + diffIDsOf(0) + `}`
	if _, _, err := Image(testBase(t, false, raw), []byte(raw), layerDesc(1), Meta{Comment: strings.Repeat("x", 1000)}); err == nil || !strings.Contains(err.Error(), "the limit is") {
		t.Errorf("large: %v", err)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"created":"2020-01-01T00:00:00Z","history":[{"empty_layer":true},null],"config":{"Env":["A=1"]},"rootfs":`+diffIDsOf(1)+`}`), 0, true)
	f.Add([]byte(`{"History":[{}],"history":null,"rootfs":`+diffIDsOf(1)+`,"RootFS":{"diff_ids":null}}`), 1, true)
	f.Add([]byte(`{"rootfs":{"type":"layers","diff_ids":["`+string(digest.FromString("x"))+`"],"DIFF_IDS":[]},"config":null}`), 0, false)
	changes, err := ParseChanges([]string{"ENV A=$A:2", "ENTRYPOINT x", "HEALTHCHECK CMD y", "LABEL a=b", "EXPOSE 80", "VOLUME /v", "WORKDIR w"})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, raw []byte, squash int, change bool) {
		if len(raw) > image.MaxConfig {
			return
		}
		b := testBase(t, false, string(raw), gzipLayer(0))
		m := Meta{Created: time.Unix(1700000000, 0), Author: "a", Squash: squash}
		if change {
			m.Changes = changes
		}
		out, config, err := Image(b, raw, layerDesc(9), m)
		if err != nil {
			return
		}
		checkImage(t, out, config)
		// What was made is a base itself.
		out2, config2, err := Image(out, config, layerDesc(10), m)
		if err != nil {
			t.Fatalf("on %s: %v", config, err)
		}
		checkImage(t, out2, config2)
	})
}
