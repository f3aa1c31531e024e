package run

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// TestProcess makes processes of an exec beside a container's own.
func TestProcess(t *testing.T) {
	c := container(t, "/proc/self/exe")
	c.Image.Env = []string{"A=1"}
	c.Options = Options{Cmd: []string{"x"}, User: "0", Hostname: "box", TTY: true, Workdir: "/tmp", Security: Security{CapDrop: []string{"ALL"}, Opt: []string{"no-new-privileges"}}}
	b, err := Make(context.Background(), c)
	must(t, err)
	spec, err := Load(c.Dir)
	must(t, err)
	if d := cmp.Diff(b.Spec, spec, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("read from disk: %s", d)
	}
	p, err := Process(c, spec, ExecOptions{Cmd: []string{"y", "z"}, Env: []string{"A=2"}})
	must(t, err)
	if p.Terminal || p.Cwd != "/tmp" || p.User.UID != 0 || !p.NoNewPrivileges || len(p.Capabilities.Bounding) != 0 || !slices.Equal(p.Args, []string{"y", "z"}) {
		t.Errorf("%+v", p)
	}
	if got := strings.Join(p.Env, " "); got != "PATH="+defaultPath+" HOSTNAME=box A=2 HOME=/root" {
		t.Errorf("environment: %s", got)
	}
	if os.Geteuid() == 0 {
		p, err = Process(c, spec, ExecOptions{Cmd: []string{"y"}, TTY: true, User: "web:extra", Workdir: "/bin/", Privileged: true})
		must(t, err)
		if !p.Terminal || p.Cwd != "/bin" || p.User.UID != 33 || p.User.GID != 90 || !slices.Contains(p.Capabilities.Effective, "CAP_CHOWN") {
			t.Errorf("%+v", p)
		}
		if got := strings.Join(p.Env, " "); got != "PATH="+defaultPath+" HOSTNAME=box TERM=xterm A=1 HOME=/var/www" {
			t.Errorf("environment: %s", got)
		}
	}
	if len(spec.Process.Capabilities.Effective) != 0 || !spec.Process.Terminal {
		t.Error("the container's own process changed")
	}
	must(t, os.Remove(filepath.Join(c.Root, "etc/passwd")))
	if p, err = Process(c, spec, ExecOptions{Cmd: []string{"y"}}); err != nil || p.User.UID != 0 {
		t.Errorf("users gone: %+v, %v", p, err)
	}
	for want, o := range map[string]ExecOptions{
		"unable to find user web: no matching entries in passwd file": {Cmd: []string{"y"}, User: "web"},
		"no exec command specified":                                   {},
		"the working directory 'x' is invalid":                        {Cmd: []string{"y"}, Workdir: "x"},
		"invalid environment variable":                                {Cmd: []string{"y"}, Env: []string{"=x"}},
	} {
		if _, err := Process(c, spec, o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

func TestMakeRefuses(t *testing.T) {
	for want, change := range map[string]func(*Container){
		"no command specified": func(c *Container) { c.Options.Cmd = nil },
		"unable to find user x: no matching entries in passwd file": func(c *Container) { c.Options.User = "x" },
		"Cannot mkdir: /etc/passwd is not a directory":              func(c *Container) { c.Options.Workdir = "/etc/passwd" },
		"directory \"rel\" is not absolute":                         func(c *Container) { c.Root = "rel" },
		"the root of container":                                     func(c *Container) { c.Root = "/nowhere" },
		`network "bridge" is not supported`:                         func(c *Container) { c.Options.Network = "bridge" },
		"Duplicate mount point: /a":                                 func(c *Container) { c.Options.Volumes = []string{"/a", "/a/"} },
		"mount at /bin/up: links of the image lead it to '/'": func(c *Container) {
			must(t, os.Symlink("../..", filepath.Join(c.Root, "bin/up")))
			c.Options.Volumes = []string{"/bin/up"}
		},
		"a volume of the image":              func(c *Container) { c.Image.Volumes = map[string]struct{}{"rel": {}} },
		"make the mount point /etc/passwd/x": func(c *Container) { c.Options.Tmpfs = []string{"/etc/passwd/x"} },
		"nobody said where volumes are":      func(c *Container) { c.Options.Volumes, c.Volumes = []string{"name:/v"}, "" },
	} {
		c := container(t, "/proc/self/exe")
		c.Options.Cmd = []string{"x"}
		change(&c)
		if _, err := Make(context.Background(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	c := container(t, "/proc/self/exe")
	c.Options.Cmd = []string{"x"}
	if _, err := Make(ctx, c); err != context.Canceled {
		t.Errorf("cancelled: %v", err)
	}
}
