package test

import (
	"archive/tar"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/varvefs/varve/bench/forms"
)

// withConfig is an image with another config, whose fields may be any.
type withConfig struct {
	v1.Image
	config, manifest []byte
}

func changeConfig(t *testing.T, img v1.Image, change func(map[string]any)) v1.Image {
	t.Helper()
	var fields map[string]any
	must(t, json.Unmarshal(mustGet[[]byte](t)(img.RawConfigFile()), &fields))
	change(fields)
	w := &withConfig{Image: img, config: mustGet[[]byte](t)(json.Marshal(fields))}
	m := *mustGet[*v1.Manifest](t)(img.Manifest())
	m.Config.Size = int64(len(w.config))
	m.Config.Digest = mustGet[v1.Hash](t)(w.ConfigName())
	w.manifest = mustGet[[]byte](t)(json.Marshal(&m))
	return w
}

func hashOf(b []byte) (v1.Hash, error) {
	h, _, err := v1.SHA256(strings.NewReader(string(b)))
	return h, err
}

func (w *withConfig) RawConfigFile() ([]byte, error) { return w.config, nil }
func (w *withConfig) RawManifest() ([]byte, error)   { return w.manifest, nil }
func (w *withConfig) Size() (int64, error)           { return int64(len(w.manifest)), nil }
func (w *withConfig) ConfigName() (v1.Hash, error)   { return hashOf(w.config) }
func (w *withConfig) Digest() (v1.Hash, error)       { return hashOf(w.manifest) }
func (w *withConfig) Manifest() (*v1.Manifest, error) {
	return v1.ParseManifest(strings.NewReader(string(w.manifest)))
}
func (w *withConfig) ConfigFile() (*v1.ConfigFile, error) {
	return v1.ParseConfigFile(strings.NewReader(string(w.config)))
}

// invariant holds what must agree in an image: its layers, their diff_ids and the
// entries of the history that made one.
func invariant(t *testing.T, img v1.Image) {
	t.Helper()
	m, c := mustGet[*v1.Manifest](t)(img.Manifest()), mustGet[*v1.ConfigFile](t)(img.ConfigFile())
	made := 0
	for _, e := range c.History {
		if !e.EmptyLayer {
			made++
		}
	}
	if len(m.Layers) != len(c.RootFS.DiffIDs) || len(m.Layers) != made {
		t.Errorf("%d layers, %d diff_ids, %d entries of the history with a layer", len(m.Layers), len(c.RootFS.DiffIDs), made)
	}
}

func configOf(t *testing.T, img v1.Image) (fields, config map[string]any) {
	t.Helper()
	must(t, json.Unmarshal(mustGet[[]byte](t)(img.RawConfigFile()), &fields))
	config, _ = fields["config"].(map[string]any)
	return fields, config
}

// TestCommitConfig changes the config with every instruction there is.
func TestCommitConfig(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 2, 100)
	r := newRegistry(t)
	base := changeConfig(t, build(t, forms.EStargz, l), func(f map[string]any) {
		f["author"] = "the base's"
		f["x-unknown"] = map[string]any{"kept": []any{1.5, "as is", nil}}
		f["config"] = map[string]any{
			"User": "base", "Cmd": []string{"base-cmd"}, "Env": []string{"PATH=/bin", "KEPT=1"}, "WorkingDir": "/base",
			"Labels": map[string]string{"kept": "1", "changed": "old"}, "ExposedPorts": map[string]any{"80/tcp": map[string]any{}},
			"Volumes": map[string]any{"/base": map[string]any{}}, "Shell": []string{"/bin/bash", "-c"}, "ArgsEscaped": true, "X-Unknown": "kept",
		}
	})
	ref := r.push("test/configured:1", base)
	h := newHost(t)
	dir := h.writable("kernel", "w", ref)
	put(t, filepath.Join(dir, "etc/new"), "new")
	args := []string{"-a", "Jo Doe <jo@example.com>", "-m", "all at once"}
	for _, c := range []string{
		`CMD ["/app", "--flag"]`, `ENTRYPOINT ["/entry"]`, `ENV PATH=/usr/bin NEW="two words"`, `EXPOSE 8080/udp 9090`,
		`HEALTHCHECK --interval=5s --retries=3 CMD curl -f http://localhost/`, `LABEL changed=new "added one"="with blanks"`, `ONBUILD RUN make`,
		`STOPSIGNAL SIGUSR1`, `USER app:staff`, `VOLUME ["/data", "/more"]`, `WORKDIR sub`,
	} {
		args = append(args, "-c", c)
	}
	img := h.made(h.commit(append(args, "w", "app:1")...))
	invariant(t, img)
	fields, config := configOf(t, img)
	none := map[string]any{}
	want := map[string]any{
		"User": "app:staff", "Cmd": []any{"/app", "--flag"}, "Entrypoint": []any{"/entry"},
		"Env": []any{"PATH=/usr/bin", "KEPT=1", "NEW=two words"}, "WorkingDir": "/base/sub",
		"Labels":       map[string]any{"kept": "1", "changed": "new", "added one": "with blanks"},
		"ExposedPorts": map[string]any{"80/tcp": none, "8080/udp": none, "9090/tcp": none},
		"Volumes":      map[string]any{"/base": none, "/data": none, "/more": none},
		"Healthcheck":  map[string]any{"Test": []any{"CMD-SHELL", "curl -f http://localhost/"}, "Interval": 5e9, "Retries": 3.0},
		"OnBuild":      []any{"RUN make"}, "StopSignal": "SIGUSR1",
		"Shell": []any{"/bin/bash", "-c"}, "ArgsEscaped": true, "X-Unknown": "kept",
	}
	// Whether a command's quoting is escaped is said of the command that is replaced.
	delete(want, "ArgsEscaped")
	delete(config, "ArgsEscaped")
	if d := cmp.Diff(want, config); d != "" {
		t.Errorf("the config (-want +got):\n%s", d)
	}
	before, _ := configOf(t, base)
	if d := cmp.Diff(before["x-unknown"], fields["x-unknown"]); d != "" || fields["author"] != "Jo Doe <jo@example.com>" || fields["architecture"] != before["architecture"] {
		t.Errorf("what is not of the commit: author %v, architecture %v, unknown (-want +got):\n%s", fields["author"], fields["architecture"], d)
	}
	c := mustGet[*v1.ConfigFile](t)(img.ConfigFile())
	last := c.History[len(c.History)-1]
	if last.Comment != "all at once" || last.Author != "Jo Doe <jo@example.com>" || last.CreatedBy != "varve commit" || last.EmptyLayer || !last.Created.Equal(c.Created.Time) || time.Since(last.Created.Time) > time.Hour {
		t.Errorf("the history ends with %+v", last)
	}
	if d := cmp.Diff(mustGet[*v1.ConfigFile](t)(base.ConfigFile()).History, c.History[:len(c.History)-1]); d != "" {
		t.Errorf("the base's history (-want +got):\n%s", d)
	}
	m := mustGet[*v1.Manifest](t)(img.Manifest())
	if m.Annotations["org.opencontainers.image.base.name"] != ref || m.Annotations["org.opencontainers.image.base.digest"] != mustGet[v1.Hash](t)(base.Digest()).String() {
		t.Errorf("annotations %v", m.Annotations)
	}
	if a := mustGet[*v1.Manifest](t)(base.Manifest()).Layers[0]; !reflect.DeepEqual(a, m.Layers[0]) {
		t.Errorf("the base's layer %+v became %+v", a, m.Layers[0])
	}

	// An entry point of the image's own leaves no command of the base.
	_, config = configOf(t, h.made(h.commit("-c", `ENTRYPOINT ["/entry"]`, "w")))
	if config["Cmd"] != nil {
		t.Errorf("ENTRYPOINT leaves Cmd %v", config["Cmd"])
	}
	_, config = configOf(t, h.made(h.commit("-c", "CMD echo shell", "w")))
	if d := cmp.Diff([]any{"/bin/bash", "-c", "echo shell"}, config["Cmd"]); d != "" && !reflect.DeepEqual(config["Cmd"], []any{"/bin/sh", "-c", "echo shell"}) {
		t.Errorf("the shell's form gives %v", config["Cmd"])
	}
	for _, bad := range []string{"FROM scratch", "RUN make", "COPY a b", "ENV", "EXPOSE none", "NONSENSE x", "WORKDIR", "# comment\nADD a b"} {
		if line := h.fails(2, "commit", "-c", bad, "w"); !strings.Contains(line, strings.Fields(strings.TrimPrefix(bad, "# comment\n"))[0]) {
			t.Errorf("%q is not named: %s", bad, line)
		}
	}
	h.ok("umount", "-a")
}

// TestCommitNothing commits a mount in which nothing was changed.
func TestCommitNothing(t *testing.T) {
	withBoth(t, func(t *testing.T, overlay string) {
		l, _ := small(t, 2, 100)
		r := newRegistry(t)
		base := build(t, forms.EStargz, l)
		ref := r.push("test/base:1", base)
		h := newHost(t)
		dir := h.writable(overlay, "w", ref)
		check := func(what string) {
			t.Helper()
			img := h.made(h.commit("-m", "nothing", "-c", "ENV A=1", "w", "app:1"))
			invariant(t, img)
			c := mustGet[*v1.ConfigFile](t)(img.ConfigFile())
			if last := c.History[len(c.History)-1]; !last.EmptyLayer || last.Comment != "nothing" || len(c.RootFS.DiffIDs) != 1 || c.Config.Env[len(c.Config.Env)-1] != "A=1" {
				t.Errorf("%s: %+v", what, c)
			}
		}
		check("at first")
		put(t, filepath.Join(dir, "etc/there-and-gone"), "")
		must(t, os.Remove(filepath.Join(dir, "etc/there-and-gone")))
		if out := h.ok("diff", "w"); out != "" {
			t.Errorf("diff: %q", out)
		}
		check("after what left no trace")
		again := h.ok("mount", "--wait", "--name", "again", "app:1")
		sameTree(t, readTree(t, h.ok("mount", "--wait", "--name", "base", ref)), readTree(t, again))
		h.ok("umount", "-a")
	})
}

// TestCommitFlags looks at each flag that is left.
func TestCommitFlags(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 2, 100)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	dir := h.writable("kernel", "w", ref)
	for _, name := range []string{"app/main", "app/debug.log", "tmp/cache/x", "etc/conf"} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		put(t, filepath.Join(dir, name), name)
	}
	must(t, os.Remove(filepath.Join(dir, "etc/hostname")))

	names := func(digest string) string {
		t.Helper()
		img := h.made(digest)
		invariant(t, img)
		if n := len(mustGet[[]v1.Layer](t)(img.Layers())); n != 2 {
			return itoa(n) + " layers"
		}
		var all []string
		for name, e := range tarOf(t, string(topLayers(t, img, 1)[0])) {
			if e.header.Typeflag != tar.TypeDir && name != ".no.prefetch.landmark" && name != "stargz.index.json" {
				all = append(all, name)
			}
		}
		return sorted(all)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "app/debug.log app/main etc/.wh.hostname etc/conf tmp/cache/x"},
		{[]string{"--exclude", "tmp"}, "app/debug.log app/main etc/.wh.hostname etc/conf"},
		{[]string{"--exclude", "**/*.log", "--exclude", "/tmp/cache"}, "app/main etc/.wh.hostname etc/conf"},
		{[]string{"--include", "app"}, "app/debug.log app/main"},
		{[]string{"--include", "app", "--include", "etc/hostname", "--exclude", "app/*.log"}, "app/main etc/.wh.hostname"},
		{[]string{"--include", "no/such"}, "1 layers"},
	} {
		if got := names(h.commit(append(c.args, "w")...)); got != c.want {
			t.Errorf("%v gives %q, want %q", c.args, got, c.want)
		}
	}

	before := h.store()
	r := h.run("commit", "--dry-run", "w", "app:dry")
	if r.code != 0 || r.out != h.ok("diff", "w")+"\n" || !strings.Contains(r.err, " names, ") {
		t.Errorf("--dry-run: %s", r)
	}
	if after := h.store(); after != before {
		t.Errorf("--dry-run left in the store %s, before %s", after, before)
	}
	h.fails(3, "mount", "--pull", "never", "app:dry")

	id := filepath.Join(h.root, "id")
	digest := h.commit("--iidfile", id, "w", "app:1")
	holds(t, id, digest)
	if r := h.run("commit", "-q", "w", "app:1"); r.err != "" {
		t.Errorf("-q: %s", r)
	}
	if r := h.run("commit", "--pause=false", "w"); r.code != 0 || strings.Count(r.out, "\n") != 1 {
		t.Errorf("--pause=false: %s", r)
	}
	if r := h.run("commit", "-p", "w"); r.code != 0 || strings.Count(r.out, "\n") != 1 {
		t.Errorf("-p: %s", r)
	}
	if r := h.run("commit", "-p", "--no-pause", "w"); r.code != 2 || r.out != "" {
		t.Errorf("-p --no-pause: %s", r)
	}
	// As docker's, flags end where the arguments begin.
	if r := h.run("commit", "w", "app:2", "-m"); r.code != 2 {
		t.Errorf("a flag after the arguments: %s", r)
	}
	hex := strings.TrimPrefix(digest, "sha256:")
	for _, args := range [][]string{
		{}, {"w", "a", "b"}, {"--push", "w"}, {"--format", "flat", "w"}, {"--compression", "lzma", "w"}, {"--compression", "zstd", "--format", "docker", "w"},
		{"--compression", "zstd:chunked", "--format", "docker", "w"}, {"--rewrite-timestamp", "w"}, {"--source-date-epoch", "yesterday", "w"}, {"--source-date-epoch", "-1", "w"},
		{"w", "app@" + digest}, {"w", "app:1@" + digest}, {"w", hex}, {"w", "oci:" + h.root + "/layout"}, {"w", "docker-archive:" + h.root + "/x.tar"}, {"w", "UPPER"}, {"w", "a b"}, {"w", "x:y:z"},
	} {
		h.fails(2, append([]string{"commit"}, args...)...)
	}
	put(t, filepath.Join(dir, "etc/id_rsa"), "secret")
	must(t, os.MkdirAll(filepath.Join(dir, "root/.ssh"), 0o700))
	put(t, filepath.Join(dir, "root/.ssh/id_ed25519"), "secret")
	if r := h.run("commit", "w"); r.code != 0 || !strings.Contains(r.err, "/root/.ssh/id_ed25519") || !strings.Contains(r.err, "--exclude") {
		t.Errorf("a secret is committed without a word: %s", r)
	}
	h.ok("umount", "w")
}

// sorted gives words in their order, in a line.
func sorted(words []string) string {
	slices.Sort(words)
	return strings.Join(words, " ")
}

// store gives the names of all files of the image store.
func (h *host) store() string {
	h.t.Helper()
	var all []string
	must(h.t, filepath.WalkDir(filepath.Join(h.root, "state/images"), func(p string, d os.DirEntry, err error) error {
		all = append(all, p)
		return err
	}))
	return sorted(all)
}

// TestCommitFormats commits on bases of both families into both.
func TestCommitFormats(t *testing.T) {
	needRoot(t)
	l, _ := small(t, 2, 1000)
	dockerBase := mustGet[v1.Image](t)(mutate.AppendLayers(empty.Image, mustGet[v1.Layer](t)(tarball.LayerFromOpener(tarball.Opener(opener(l))))))
	dockerBase = changeConfig(t, dockerBase, func(f map[string]any) { f["os"], f["architecture"] = "linux", "amd64" })
	bases := map[string]v1.Image{"oci": build(t, forms.Gzip, l), "docker": dockerBase}
	r := newRegistry(t)
	h := newHost(t)
	for base, img := range bases {
		ref := r.push("test/"+base+":1", img)
		dir := h.writable("fuse", base, ref, "--platform", "linux/amd64")
		put(t, filepath.Join(dir, "etc/new"), "new")
		want := readTree(t, dir).wholeSeconds()
		for _, format := range []string{"", "oci", "docker"} {
			for _, compression := range []string{"", "estargz", "gzip", "zstd", "zstd:chunked"} {
				zstd := strings.HasPrefix(compression, "zstd")
				args := []string{"--platform", "linux/amd64", "app:" + base}
				if zstd && format == "docker" {
					h.fails(2, "commit", "--format", format, "--compression", compression, base)
					continue
				}
				got := h.made(h.commit("--format", format, "--compression", compression, base, "app:"+base))
				docker := (format == "docker" || format == "" && base == "docker") && !zstd
				what := base + " to " + format + " with " + compression
				m := mustGet[*v1.Manifest](t)(got.Manifest())
				wantTypes := []types.MediaType{types.OCIManifestSchema1, types.OCIConfigJSON, types.OCILayer, types.OCILayer}
				if docker {
					wantTypes = []types.MediaType{types.DockerManifestSchema2, types.DockerConfigJSON, types.DockerLayer, types.DockerLayer}
				}
				if zstd {
					wantTypes[3] = types.OCILayerZStd
				}
				if d := cmp.Diff(wantTypes, []types.MediaType{m.MediaType, m.Config.MediaType, m.Layers[0].MediaType, m.Layers[1].MediaType}); d != "" {
					t.Errorf("%s (-want +got):\n%s", what, d)
				}
				if docker && m.Annotations != nil {
					t.Errorf("%s: annotations %v", what, m.Annotations)
				}
				invariant(t, got)
				if format == "" || base == format {
					again := h.ok(append([]string{"mount", "--wait", "--name", "again"}, args...)...)
					sameTree(t, want, readTree(t, again).wholeSeconds())
					h.ok("umount", "again")
				}
			}
		}
	}
	h.ok("umount", "-a")
}
