package install

import (
	"bytes"
	"fmt"

	"github.com/containerd/platforms"
	"github.com/pelletier/go-toml/v2"
)

// Identifiers of containerd's plugins.
const (
	criV1    = "io.containerd.grpc.v1.cri"       // of containerd 1, and of configurations of version 2
	images   = "io.containerd.cri.v1.images"     // of containerd 2
	runtimes = "io.containerd.cri.v1.runtime"    // of containerd 2
	transfer = "io.containerd.transfer.v1.local" // of both
)

// setting is a value that containerd must have in the end.
type setting struct {
	value any
	keys  []string // where it stands
}

// dropIn is a drop-in file.
type dropIn struct {
	doc  table
	want []setting // as `containerd config dump` will say it
	note string    // what the file's reader should know
}

func (d *dropIn) set(value any, keys ...string) { put(d.doc, value, keys...) }

// expect notes a setting that containerd must have, where a dump of it has it.
func (d *dropIn) expect(value any, keys ...string) { d.want = append(d.want, setting{value, keys}) }

// make writes the drop-in that fits what the user's own files say.
func (c *Containerd) make(s *site, user table) (*dropIn, error) {
	d := &dropIn{doc: table{}}
	d.set(int64(s.version()), "version")
	proxy := []string{"proxy_plugins", c.Name}
	if p := at(user, proxy...); p != nil {
		return nil, fmt.Errorf("%s or what it imports has proxy_plugins.%s already: remove it there, or take another name", s.main.path, c.Name)
	}
	others, _ := at(user, "proxy_plugins").(table)
	for name, o := range others {
		if t, _ := o.(table); t["address"] == c.Address {
			// containerd removes what is on a snapshotter and was not made by the name.
			return nil, fmt.Errorf("%s or what it imports has this snapshotter as %s already: it can have one name only, so remove that first", s.main.path, name)
		}
	}
	plugin := table{"type": "snapshot", "address": c.Address}
	if s.release.atLeast(1, 7) {
		// The transfer service, and CRI of containerd 2.1 and later, label layers only for
		// a snapshotter that exports this; the kubelet measures the file system of root.
		plugin["exports"] = table{"root": c.Root, "enable_remote_snapshot_annotations": "true"}
	}
	d.set(plugin, proxy...)
	d.expect(plugin, proxy...)
	if s.release.major == 1 {
		return d, c.makeCRI1(d, s, user)
	}
	c.unpack(d, s, user)
	c.makeCRI2(d, s, user)
	return d, nil
}

// version gives the version that the drop-in must have. Before 2.4 containerd puts
// files together before it converts them, so that a table of version 2 is lost beside
// one of version 3.
func (s *site) version() int {
	switch {
	case s.release.major == 1, s.main.version == 2 && !s.release.atLeast(2, 4):
		return 2
	}
	return 3
}

// makeCRI1 makes what Kubernetes needs of containerd 1. There a plugin's table in an
// import replaces the whole of it, so it is a copy of the user's with some keys
// changed.
func (c *Containerd) makeCRI1(d *dropIn, s *site, user table) error {
	if !c.Default && !c.RuntimeClass {
		return nil
	}
	if c.RuntimeClass && !s.release.atLeast(1, 7) {
		return fmt.Errorf("containerd %d.%d has one snapshotter for all pods: take it as the default, or a containerd from 1.7 on", s.release.major, s.release.minor)
	}
	cri := table{}
	if of, ok := at(user, "plugins", criV1).(table); ok && len(of) > 0 {
		cri = clone(of).(table)
		d.note = "# containerd 1 takes a plugin's table from the last file that has it, so what follows\n" +
			"# is a copy of that in " + s.main.path + " or its imports, with the snapshotter in it.\n" +
			"# After a change there: varve install containerd again.\n"
	}
	d.set(cri, "plugins", criV1)
	at := func(keys ...string) []string { return append([]string{"plugins", criV1, "containerd"}, keys...) }
	c.criKeys(d, s, user, at, at)
	d.set(false, at("disable_snapshot_annotations")...)
	d.expect(false, at("disable_snapshot_annotations")...)
	if c.RuntimeClass && len(own(user)) == 0 { // a list of runtimes replaces containerd's own
		d.set(defaultRuntime(user, s), at("runtimes", "runc")...)
	}
	return nil
}

// own gives the runtimes that the user's files list for containerd 1.
func own(user table) table {
	t, _ := at(user, "plugins", criV1, "containerd", "runtimes").(table)
	return t
}

// makeCRI2 makes what Kubernetes needs of containerd 2.
func (c *Containerd) makeCRI2(d *dropIn, s *site, user table) {
	if !c.Default && !c.RuntimeClass {
		return
	}
	inImages := func(keys ...string) []string { return append([]string{"plugins", images}, keys...) }
	inRuntimes := func(keys ...string) []string { return append([]string{"plugins", runtimes, "containerd"}, keys...) }
	imageKeys, runtimeKeys := inImages, inRuntimes
	if s.version() == 2 {
		imageKeys = func(keys ...string) []string { return append([]string{"plugins", criV1, "containerd"}, keys...) }
		runtimeKeys = imageKeys
		// containerd converts a snapshotter of version 2 only where this table is.
		d.set(table{}, imageKeys("runtimes")...)
	}
	c.criKeys(d, s, user, imageKeys, runtimeKeys)
	for i, w := range d.want { // a dump has containerd 2's names always
		if len(w.keys) > 3 && w.keys[1] == criV1 {
			if w.keys[3] == "runtimes" {
				d.want[i].keys = inRuntimes(w.keys[3:]...)
			} else {
				d.want[i].keys = inImages(w.keys[3:]...)
			}
		}
	}
	if c.RuntimeClass { // by which pulls for a pod of that class know where to unpack
		row := table{"platform": platforms.Format(platforms.DefaultSpec()), "snapshotter": c.Name}
		d.set(row, inImages("runtime_platforms", c.Name)...)
		d.expect(row, inImages("runtime_platforms", c.Name)...)
	}
	if pullsItself(s, user) {
		d.set(false, imageKeys("disable_snapshot_annotations")...)
		d.expect(false, inImages("disable_snapshot_annotations")...)
	}
}

// criKeys sets the keys that all versions have.
func (c *Containerd) criKeys(d *dropIn, s *site, user table, imageKeys, runtimeKeys func(...string) []string) {
	if c.Default {
		d.set(c.Name, imageKeys("snapshotter")...)
		d.expect(c.Name, imageKeys("snapshotter")...)
	}
	if c.RuntimeClass {
		runtime := defaultRuntime(user, s)
		runtime["snapshotter"] = c.Name
		d.set(runtime, runtimeKeys("runtimes", c.Name)...)
		d.expect(table{"snapshotter": c.Name}, runtimeKeys("runtimes", c.Name)...)
	}
}

// defaultRuntime gives a copy of the runtime that pods without a class have: pods of
// our class are to differ in nothing but the snapshotter.
func defaultRuntime(user table, s *site) table {
	for _, in := range [][]string{{"plugins", runtimes, "containerd"}, {"plugins", criV1, "containerd"}} {
		name, _ := at(user, append(in, "default_runtime_name")...).(string)
		if name == "" {
			name = "runc"
		}
		if r, ok := at(user, append(in, "runtimes", name)...).(table); ok && at(r, "runtime_type") != nil {
			return clone(r).(table)
		}
	}
	r := table{"runtime_type": "io.containerd.runc.v2"}
	if s.release.major == 1 { // as its own has
		r["sandbox_mode"] = "podsandbox"
	}
	return r
}

// pullsItself reports whether CRI pulls without the transfer service, which containerd
// does before 2.1 and where the user's settings need it. It labels layers then only
// where that is not disabled, as it is by default. Where the transfer service can
// pull, it should: only it asks image verifiers.
func pullsItself(s *site, user table) bool {
	if !s.release.atLeast(2, 1) {
		return true
	}
	for _, in := range [][]string{{"plugins", images}, {"plugins", criV1}, {"plugins", criV1, "containerd"}} {
		t, _ := at(user, in...).(table)
		for _, k := range []string{"use_local_image_pull", "discard_unpacked_layers", "image_pull_with_sync_fs"} {
			if v, _ := t[k].(bool); v {
				return true
			}
		}
		if v, ok := t["max_concurrent_downloads"].(int64); ok && v != 3 {
			return true
		}
		for _, k := range []string{"mirrors", "configs", "auths"} {
			if v, _ := at(t, "registry", k).(table); len(v) > 0 {
				return true
			}
		}
	}
	return false
}

// unpack adds a row for the transfer service, without which it unpacks nothing into
// the snapshotter. A list in an import replaces the one before it, and any replaces
// containerd's own, so all rows are here.
func (c *Containerd) unpack(d *dropIn, s *site, user table) {
	here := platforms.Format(platforms.DefaultSpec())
	rows := tablesAt(user, "plugins", transfer, "unpack_config")
	if len(rows) == 0 {
		rows = append(rows, table{"platform": here, "snapshotter": "overlayfs", "differ": "walking"})
		if s.release.atLeast(2, 3) {
			spec := platforms.DefaultSpec()
			spec.OSFeatures = []string{"erofs"}
			rows = append(rows, table{"platform": platforms.FormatAll(spec), "snapshotter": "erofs", "differ": "erofs", "optional": true})
		}
	}
	own := table{"platform": here, "snapshotter": c.Name, "differ": "walking"}
	if s.release.atLeast(2, 3) {
		own["optional"] = true // containerd starts without it, too
	}
	rows = append(rows, own)
	list := make([]any, 0, len(rows))
	for _, r := range rows {
		list = append(list, r)
	}
	d.set(list, "plugins", transfer, "unpack_config")
	d.expect(list, "plugins", transfer, "unpack_config")
}

// text gives the file.
func (d *dropIn) text() ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(header + d.note)
	e := toml.NewEncoder(&b)
	e.SetIndentTables(true)
	if err := e.Encode(d.doc); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
