package install

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Plan is what an installation or its removal will do.
type Plan struct {
	Changes Changes
	// Notes are what the user should know beside.
	Notes []string

	site  *site
	drop  *dropIn // nil if it goes
	again bool    // there was one before
	leave string  // the name that it had there and will not have any more
	user  table   // the configuration without ours
}

// kept is where an edited file is kept as it was.
func kept(path string) string { return path + ".before-varve" }

// PlanInstall finds out what is to be changed so that containerd finds the
// snapshotter. It changes nothing.
func (c *Containerd) PlanInstall(ctx context.Context) (*Plan, error) {
	s, err := c.find(ctx)
	if err != nil {
		return nil, err
	}
	if other, err := c.others(s); err != nil {
		return nil, err
	} else if other != "" {
		// Each containerd removes the snapshots that it does not know.
		return nil, fmt.Errorf("another containerd has this snapshotter (%s): a snapshotter serves one only", other)
	}
	p := &Plan{site: s}
	if p.user, err = c.merged(s.main, s.dropIn, s.release.major == 1); err != nil {
		return nil, err
	}
	old, err := c.ours(s.dropIn)
	if err != nil {
		return nil, err
	}
	if p.drop, err = c.make(s, p.user); err != nil {
		return nil, err
	}
	p.again = old != nil
	if p.leave = nameIn(old); p.leave == c.Name {
		p.leave = ""
	}
	text, err := p.drop.text()
	if err != nil {
		return nil, err
	}
	// First what is imported, then what imports it: containerd may start in between.
	p.Changes.add(s.dropIn, old, text)
	if !s.main.covers(s.dropIn) {
		if err := c.planImport(p); err != nil {
			return nil, fmt.Errorf("%s does not import %s, and %w: add %q to its imports by hand", s.main.path, s.dropIn, err, s.pattern)
		}
	}
	if !c.Offline && !c.exists(c.Address) {
		p.Notes = append(p.Notes, "nothing listens on "+c.Address+" yet: varve install systemd has it done")
	}
	if c.RuntimeClass {
		p.Notes = append(p.Notes, "pods choose it by a RuntimeClass:\n"+runtimeClass(c.Name))
	}
	return p, nil
}

// runtimeClass is what the cluster needs for --runtime-class.
func runtimeClass(name string) string {
	return fmt.Sprintf("apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata:\n  name: %s\nhandler: %s", name, name)
}

// ours gives our own drop-in, nil if there is none.
func (c *Containerd) ours(path string) ([]byte, error) {
	b, err := c.read(path)
	if err == nil && b != nil {
		if err = c.editable(path); err == nil && !bytes.HasPrefix(b, []byte(header)) {
			err = fmt.Errorf("%s is there and was not written by varve: move it away", path)
		}
	}
	return b, err
}

// Leaves gives the name that containerd had for the snapshotter and will not have any
// more, "" if there is none.
func (p *Plan) Leaves() string { return p.leave }

// nameIn gives the name of the snapshotter in a drop-in of ours, "" if there is none.
func nameIn(dropIn []byte) string {
	doc := table{}
	if toml.Unmarshal(dropIn, &doc) != nil {
		return "" // it was edited; containerd took it for nothing either
	}
	all, _ := doc["proxy_plugins"].(table)
	for name := range all {
		return name
	}
	return ""
}

// planImport has the drop-in imported.
func (c *Containerd) planImport(p *Plan) error {
	s := p.site
	if err := c.editable(s.importIn); err != nil {
		return err
	}
	old, err := c.read(s.importIn)
	if err != nil {
		return err
	}
	var text []byte
	switch {
	case old == nil && s.flavor == Plain:
		text = s.created()
	case s.flavor == Plain:
		text, err = addImport(old, s.pattern)
	default:
		text, err = s.template(old)
	}
	if err != nil {
		return err
	}
	if old != nil && !bytes.Equal(old, text) {
		was, err := c.read(kept(s.importIn))
		if err != nil {
			return err
		}
		p.Changes.add(kept(s.importIn), was, old)
	}
	p.Changes.add(s.importIn, old, text)
	return nil
}

// created is a configuration where there was none: without one containerd imports
// nothing.
func (s *site) created() []byte {
	return []byte(fmt.Sprintf("%s%sversion = %d\n", header, importLine(s.pattern, "\n"), s.version()))
}

// base is what k3s and rke2 put into a template: the configuration as without one.
const base = `{{ template "base" . }}` + "\n"

// template gives the template with the import in it, from which the configuration is
// generated.
func (s *site) template(old []byte) ([]byte, error) {
	line := importLine(s.pattern, "\n")
	switch {
	case old == nil:
		return []byte(line + base), nil
	case bytes.HasPrefix(old, []byte(line)):
		return old, nil
	}
	for l := range bytes.Lines(old) {
		if f := strings.Fields(string(l)); len(f) > 0 && strings.HasPrefix(f[0], "imports") {
			return nil, fmt.Errorf("%s has imports of its own", s.importIn)
		}
	}
	return append([]byte(line), old...), nil
}

// PlanUninstall finds out what is to be taken back. It changes nothing.
func (c *Containerd) PlanUninstall(ctx context.Context) (*Plan, error) {
	any := *c
	any.Version = "1.6" // which one does not matter here, and it may be gone
	s, err := any.find(ctx)
	if err != nil {
		return nil, err
	}
	p := &Plan{site: s}
	old, err := c.ours(s.dropIn)
	if err != nil {
		return nil, err
	}
	if p.user, err = c.merged(s.main, s.dropIn, false); err != nil {
		return nil, err
	}
	if err := c.planRestore(p); err != nil {
		return nil, fmt.Errorf("take the import back: %w: remove %q from it by hand", err, s.pattern)
	}
	p.Changes.add(s.dropIn, old, nil)
	p.leave = nameIn(old)
	return p, nil
}

// planRestore takes the import back.
func (c *Containerd) planRestore(p *Plan) error {
	s := p.site
	old, err := c.read(s.importIn)
	if err != nil || old == nil {
		return err
	}
	var text []byte
	switch line := importLine(s.pattern, "\n"); {
	case s.flavor != Plain:
		text = bytes.TrimPrefix(old, []byte(line))
		if string(text) == base && len(text) < len(old) {
			text = nil
		}
	case bytes.HasPrefix(old, []byte(header+line)) && bytes.Count(old, []byte("\n")) == 3 && bytes.Contains(old, []byte("\nversion = ")):
		text = nil // all of it is ours
	default:
		if text, err = removeImport(old, s.pattern); err != nil {
			return err
		}
	}
	if text != nil && bytes.Equal(text, old) {
		return nil
	}
	if err := c.editable(s.importIn); err != nil {
		return err
	}
	p.Changes.add(s.importIn, old, text)
	was, err := c.read(kept(s.importIn))
	if err != nil {
		return err
	}
	p.Changes.add(kept(s.importIn), was, nil)
	return nil
}

// emptied gives the directory of drop-ins that is of no use any more: where nothing
// but ours imported from it, it was made for ours.
func (p *Plan) emptied() string {
	if p.drop == nil && p.Changes.touches(p.site.importIn) {
		return filepath.Dir(p.site.dropIn)
	}
	return ""
}
