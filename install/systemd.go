package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Systemd is the daemon as services of systemd's: its sockets are there before it is,
// so that who comes to them waits for it rather than finding nobody.
type Systemd struct {
	Node
	Program string   // the daemon's, an absolute path
	Args    []string // that make it one
	Env     []string // NAME=VALUE
	// Sockets are the sockets by the names under which the daemon expects them. The
	// first is the users', open to Group; the others are root's.
	Sockets []Socket
	// Group may use the daemon, if the machine has it.
	Group string
}

// Socket is one that systemd listens on.
type Socket struct{ Name, Path string }

// unitDir is where a machine's administrator has units.
const unitDir = "/etc/systemd/system"

const unitHeader = "# Written by varve install systemd; varve uninstall systemd removes it.\n"

// service is the name of the daemon's unit, without its type.
const service = "varve"

// plainWord is what needs no quoting in a unit.
var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@+=:,./-]+$`)

// PlanInstall finds out which units are to be written. It changes nothing.
func (s *Systemd) PlanInstall(context.Context) (Changes, error) {
	for _, w := range append(slices.Concat([]string{s.Program}, s.Args, s.Env), s.paths()...) {
		if !plainWord.MatchString(w) {
			return nil, fmt.Errorf("%q has characters that mean something in a unit: use another path", w)
		}
	}
	for _, p := range append(s.paths(), s.Program) {
		if !filepath.IsAbs(p) {
			return nil, fmt.Errorf("%q: want an absolute path", p)
		}
	}
	if !s.Offline && !s.booted() {
		return nil, errors.New("systemd does not run this machine: have `varve daemon` started by what does, or write the units below another directory (--prefix)")
	}
	group, err := s.hasGroup()
	if err != nil {
		return nil, err
	}
	var cs Changes
	for name, text := range s.units(group) {
		path := filepath.Join(unitDir, name)
		old, err := s.ours(path)
		if err != nil {
			return nil, err
		}
		cs.add(path, old, []byte(text))
	}
	slices.SortFunc(cs, func(a, b Change) int { return strings.Compare(a.Path, b.Path) })
	return cs, nil
}

func (s *Systemd) paths() (out []string) {
	for _, k := range s.Sockets {
		out = append(out, k.Path)
	}
	return out
}

// ours gives a unit of ours, nil if there is none.
func (s *Systemd) ours(path string) ([]byte, error) {
	if err := s.Node.editable(path); err != nil {
		return nil, err
	}
	b, err := s.read(path)
	if err == nil && b != nil && !bytes.HasPrefix(b, []byte(unitHeader)) {
		err = fmt.Errorf("%s is there and was not written by varve: move it away", path)
	}
	return b, err
}

// hasGroup looks the group up in the machine's own file.
func (s *Systemd) hasGroup() (bool, error) {
	b, err := s.read("/etc/group")
	if err != nil || s.Group == "" {
		return false, err
	}
	return bytes.HasPrefix(b, []byte(s.Group+":")) || bytes.Contains(b, []byte("\n"+s.Group+":")), nil
}

func (s *Systemd) socketUnits() (names []string) {
	for _, k := range s.Sockets {
		names = append(names, k.Name+".socket")
	}
	return names
}

// units gives the units' texts by name.
func (s *Systemd) units(group bool) map[string]string {
	env := ""
	for _, e := range s.Env {
		env += "Environment=" + e + "\n"
	}
	out := map[string]string{service + ".service": unitHeader + `[Unit]
Description=Container images mounted as they are read
# Who uses it at the boot comes after it, and goes before it when the machine stops.
After=network.target local-fs.target
Before=containerd.service docker.service k3s.service k3s-agent.service rke2-server.service rke2-agent.service
# However often it dies: a socket whose service gave up turns everybody away.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart=` + strings.Join(append([]string{s.Program}, s.Args...), " ") + "\n" + env + `Sockets=` + strings.Join(s.socketUnits(), " ") + `
Restart=always
RestartSec=1
# Containers and what stands beside them live on without it.
KillMode=process
Delegate=yes
OOMScoreAdjust=-900
# A file for every mount, layer and container.
LimitNOFILE=1048576
TasksMax=infinity

[Install]
WantedBy=multi-user.target
`}
	for i, k := range s.Sockets {
		mode := "SocketMode=0600\n"
		if i == 0 && group {
			mode = "SocketMode=0660\nSocketGroup=" + s.Group + "\n"
		}
		out[k.Name+".socket"] = unitHeader + `[Unit]
Description=` + k.Name + ` socket

[Socket]
ListenStream=` + k.Path + `
FileDescriptorName=` + k.Name + `
Service=` + service + `.service
` + mode + `DirectoryMode=0755

[Install]
WantedBy=sockets.target
`
	}
	return out
}

// Do writes the units and has the sockets listened on, now and at every boot. What is
// so already stays untouched. The report says what was done, a line each.
func (s *Systemd) Do(ctx context.Context, cs Changes) (report []string, err error) {
	undo, err := s.apply(cs)
	if err != nil {
		return nil, err
	}
	report = wrote(cs)
	if s.Offline {
		return report, nil
	}
	if len(cs) > 0 {
		if _, err := s.run(ctx, "systemctl", "daemon-reload"); err != nil {
			return nil, errors.Join(err, undo())
		}
	}
	for _, u := range s.socketUnits() {
		out, _ := s.run(ctx, "systemctl", "is-enabled", u)
		if strings.TrimSpace(string(out)) == "enabled" && s.active(ctx, u) != "" {
			continue
		}
		if _, err := s.run(ctx, "systemctl", "enable", "--now", u); err != nil {
			return nil, fmt.Errorf("the units are written, but: %w", err)
		}
		report = append(report, "enabled "+u)
	}
	if cs.touches(filepath.Join(unitDir, service+".service")) && s.active(ctx, service+".service") != "" {
		report = append(report, "the daemon that runs keeps to its old unit until systemctl restart "+service)
	}
	return report, nil
}

// PlanUninstall finds out which units are to be removed. It changes nothing.
func (s *Systemd) PlanUninstall(context.Context) (Changes, error) {
	var cs Changes
	for name := range s.units(false) {
		path := filepath.Join(unitDir, name)
		old, err := s.ours(path)
		if err != nil {
			return nil, err
		}
		cs.add(path, old, nil)
	}
	slices.SortFunc(cs, func(a, b Change) int { return strings.Compare(a.Path, b.Path) })
	return cs, nil
}

// Undo stops the daemon and removes its units.
func (s *Systemd) Undo(ctx context.Context, cs Changes) (report []string, err error) {
	if s.booted() && len(cs) > 0 {
		var names []string
		for _, c := range cs {
			names = append(names, filepath.Base(c.Path))
		}
		if _, err := s.run(ctx, "systemctl", append([]string{"disable", "--now"}, names...)...); err != nil {
			return nil, err
		}
		report = append(report, "stopped "+strings.Join(names, ", "))
	}
	if _, err := s.apply(cs); err != nil {
		return report, err
	}
	report = append(report, wrote(cs)...)
	if s.booted() && len(cs) > 0 {
		if _, err := s.run(ctx, "systemctl", "daemon-reload"); err != nil {
			return report, err
		}
		for _, p := range s.paths() {
			if err := os.Remove(s.real(p)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return report, err
			}
		}
	}
	return report, nil
}
