package install

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func (m *machine) systemd(offline bool) *Systemd {
	return &Systemd{Node: m.node(offline), Program: "/usr/local/bin/varve", Args: []string{"daemon"}, Group: "varve", Sockets: []Socket{
		{"varve", "/run/varve/varve.sock"}, {"varve-snapshotter", "/run/varve/snapshotter.sock"}}}
}

func TestUnits(t *testing.T) {
	m := newMachine(t, map[string]string{"/etc/group": "root:x:0:\nvarve:x:99:\n"})
	s := m.systemd(true)
	s.Env = []string{"VARVE_ROOT=/srv/varve"}
	before := m.tree()
	cs, err := s.PlanInstall(context.Background())
	must(t, err)
	var text strings.Builder
	cs.Show(&text)
	golden(t, "units", text.String())
	if _, err := s.Do(context.Background(), cs); err != nil {
		t.Fatal(err)
	}
	if cs, err = s.PlanInstall(context.Background()); err != nil || len(cs) > 0 {
		t.Errorf("a second time: %+v, %v", cs, err)
	}
	// As systemd itself reads them, where it is there to do so.
	if program, err := exec.LookPath("systemd-analyze"); err == nil {
		dir := t.TempDir()
		for name, unit := range s.units(false) {
			unit = strings.Replace(unit, s.Program, "/bin/true", 1)
			must(t, os.WriteFile(filepath.Join(dir, name), []byte(unit), 0o644))
		}
		out, err := exec.Command(program, "verify", filepath.Join(dir, "varve.service"), filepath.Join(dir, "varve.socket"), filepath.Join(dir, "varve-snapshotter.socket")).CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, dir) {
				t.Errorf("systemd-analyze verify (%v): %s", err, line)
			}
		}
	}
	gone, err := s.PlanUninstall(context.Background())
	must(t, err)
	if _, err := s.Undo(context.Background(), gone); err != nil {
		t.Fatal(err)
	}
	must(t, os.Remove(m.dir+unitDir))
	must(t, os.Remove(m.dir+"/etc/systemd"))
	if now := m.tree(); now != before {
		t.Errorf("left:\n%s\nit was:\n%s", now, before)
	}
}

// TestSystemd drives a systemd that says what it is asked.
func TestSystemd(t *testing.T) {
	m := newMachine(t, map[string]string{"/run/systemd/system/x": ""})
	on := map[string]bool{}
	m.answer = func(line string) (string, error) {
		f := strings.Fields(line)
		unit := f[len(f)-1]
		switch {
		case f[1] == "is-enabled" && on[unit]:
			return "enabled\n", nil
		case f[1] == "is-active" && on[unit]:
			return "active\n", nil
		case f[1] == "is-enabled", f[1] == "is-active":
			return "disabled\n", errNo
		case f[1] == "enable":
			on[unit] = true
		}
		return "", nil
	}
	s := m.systemd(false)
	do := func() []string {
		t.Helper()
		m.ran = nil
		cs, err := s.PlanInstall(context.Background())
		must(t, err)
		said, err := s.Do(context.Background(), cs)
		must(t, err)
		return said
	}
	did := func() []string {
		return slices.DeleteFunc(slices.Clone(m.ran), func(l string) bool { return strings.HasPrefix(l, "systemctl is-") })
	}
	do()
	if want := []string{"systemctl daemon-reload", "systemctl enable --now varve.socket", "systemctl enable --now varve-snapshotter.socket"}; !slices.Equal(did(), want) {
		t.Errorf("ran %q, want %q", did(), want)
	}
	if said := do(); len(said) > 0 || len(did()) > 0 {
		t.Errorf("a second time: %q, ran %q", said, did())
	}
	// A new path of the program, while a daemon runs.
	on["varve.service"], s.Program = true, "/opt/varve"
	if said := do(); !slices.Equal(did(), []string{"systemctl daemon-reload"}) || !strings.Contains(strings.Join(said, "\n"), "keeps to its old unit") {
		t.Errorf("a changed unit: %q, ran %q", said, did())
	}
	cs, err := s.PlanUninstall(context.Background())
	must(t, err)
	m.ran = nil
	if _, err := s.Undo(context.Background(), cs); err != nil {
		t.Fatal(err)
	}
	if want := []string{"systemctl disable --now varve-snapshotter.socket varve.service varve.socket", "systemctl daemon-reload"}; !slices.Equal(m.ran, want) {
		t.Errorf("ran %q, want %q", m.ran, want)
	}
	m.answer = func(string) (string, error) { return "", errNo }
	if cs, err = s.PlanInstall(context.Background()); err != nil {
		t.Fatal(err)
	}
	m.refuses("no", func() error { _, err := s.Do(context.Background(), cs); return err })
}

func TestUnitsRefused(t *testing.T) {
	for _, tt := range []struct {
		want  string
		files map[string]string
		set   func(*Systemd)
	}{
		{"does not run this machine", nil, func(s *Systemd) { s.Offline = false }},
		{"mean something in a unit", nil, func(s *Systemd) { s.Program = "/opt/my programs/varve" }},
		{"mean something in a unit", nil, func(s *Systemd) { s.Env = []string{"VARVE_ROOT=/srv/%h"} }},
		{"want an absolute path", nil, func(s *Systemd) { s.Program = "varve" }},
		{"not written by varve", map[string]string{unitDir + "/varve.service": "[Service]\n"}, func(*Systemd) {}},
	} {
		m := newMachine(t, tt.files)
		s := m.systemd(true)
		tt.set(s)
		m.refuses(tt.want, func() error { _, err := s.PlanInstall(context.Background()); return err })
	}
}
