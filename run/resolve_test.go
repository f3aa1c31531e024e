package run

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func caller(dir string) Caller {
	return Caller{Dir: dir, Getenv: func(key string) (string, bool) {
		if key == "MINE" {
			return "a b", true
		}
		return "", false
	}}
}

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"env":  "\xef\xbb\xbf# a comment\n\n  A=1\nB='two words' \nMINE\nOTHER\nC=\n",
		"prof": "{ \"defaultAction\":\n \"SCMP_ACT_ALLOW\" }",
	})
	o := Options{
		Env: []string{"A=2", "MINE", "OTHER", "E="}, EnvFiles: []string{"env"},
		Volumes:  []string{"./x:/x:ro", "..:/y", "name:/z", "/abs:/a", "/only"},
		Security: Security{Opt: []string{"seccomp=prof", "seccomp=unconfined", "label:disable", "no-new-privileges:true"}},
	}
	must(t, o.Resolve(caller(dir)))
	want := Options{
		Env:      []string{"A=1", "B='two words' ", "MINE=a b", "C=", "A=2", "MINE=a b", "OTHER", "E="},
		Volumes:  []string{dir + "/x:/x:ro", filepath.Dir(dir) + ":/y", "name:/z", "/abs:/a", "/only"},
		Security: Security{Opt: []string{`seccomp={"defaultAction":"SCMP_ACT_ALLOW"}`, "seccomp=unconfined", "label=disable", "no-new-privileges=true"}},
	}
	if d := cmp.Diff(want, o); d != "" {
		t.Error(d)
	}
	must(t, o.Check())
	once := o
	must(t, o.Resolve(caller("/elsewhere")))
	if d := cmp.Diff(once, o); d != "" {
		t.Errorf("resolved twice: %s", d)
	}
	x := ExecOptions{Cmd: []string{"x"}, Env: []string{"MINE"}, EnvFiles: []string{filepath.Join(dir, "env")}}
	must(t, x.Resolve(caller("/")))
	if len(x.Env) != 5 || x.Env[4] != "MINE=a b" || x.Check() != nil {
		t.Errorf("exec: %+v, %v", x, x.Check())
	}

	write(t, dir, map[string]string{"bad1": "=x", "bad2": "a b=x", "bad3": "\xff=1"})
	for want, bad := range map[string]Options{
		"no variable name":        {EnvFiles: []string{"bad1"}},
		"contains whitespaces":    {EnvFiles: []string{"bad2"}},
		"line 1 is not UTF-8":     {EnvFiles: []string{"bad3"}},
		"/dev/zero has more than": {EnvFiles: []string{"/dev/zero"}},
		"no such file":            {EnvFiles: []string{"none"}},
		"invalid environment":     {Env: []string{"=x"}},
		"opening seccomp profile": {Security: Security{Opt: []string{"seccomp=none"}}},
		"seccomp profile " + dir:  {Security: Security{Opt: []string{"seccomp=env"}}},
	} {
		if err := bad.Resolve(caller(dir)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

func TestEnviron(t *testing.T) {
	c := Container{
		Image:   ocispec.ImageConfig{Env: []string{"PATH=/img", "A=img", "B=img", "junk"}},
		Options: Options{Env: []string{"A=opt", "C=1", "B"}},
	}
	for _, test := range []struct {
		tty  bool
		more []string
		want string
	}{
		{false, nil, "PATH=/img HOSTNAME=h A=opt C=1 HOME=/home/u"},
		{true, []string{"TERM=dumb", "C=2", "HOME=/x"}, "PATH=/img HOSTNAME=h TERM=dumb A=opt C=2 HOME=/x"},
		{true, []string{"PATH", "HOSTNAME", "A"}, "TERM=xterm C=1 HOME=/home/u"},
	} {
		if got := strings.Join(c.environ("h", "/home/u", test.tty, test.more...), " "); got != test.want {
			t.Errorf("%v %v: %s, want %s", test.tty, test.more, got, test.want)
		}
	}
	if got := strings.Join((&Container{}).environ("h", "/", false), " "); got != "PATH="+defaultPath+" HOSTNAME=h HOME=/" {
		t.Errorf("an image that says nothing: %s", got)
	}
}

func TestEtc(t *testing.T) {
	dir := t.TempDir()
	c := Container{ID: "0123456789abcdef", Options: Options{Network: NetworkNone, AddHosts: []string{"db:10.0.0.1"}, ReadOnly: true}}
	host, err := c.hostname()
	if err != nil || host != "0123456789ab" {
		t.Errorf("hostname %q, %v", host, err)
	}
	etc, err := c.etc(dir, host)
	must(t, err)
	read := func(name string) string {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		return string(raw)
	}
	if got := read("hosts"); got != localHosts+"10.0.0.1\tdb\n" {
		t.Errorf("hosts: %q", got)
	}
	if got := read("hostname"); got != "0123456789ab\n" {
		t.Errorf("hostname: %q", got)
	}
	if len(etc) != 3 || etc[2].dest != "/etc/hosts" || !etc[2].readOnly {
		t.Errorf("%+v", etc)
	}
	c.Options = Options{}
	mine, err := os.Hostname()
	must(t, err)
	if host, err := c.hostname(); err != nil || host != mine {
		t.Errorf("with the host's network: %q, %v", host, err)
	}
	if _, err = c.etc(dir, mine); err != nil {
		t.Fatal(err)
	}
	if hosts, err := os.ReadFile("/etc/hosts"); err == nil && !strings.HasPrefix(read("hosts"), string(hosts)) {
		t.Errorf("the host's names: %q", read("hosts"))
	}
}
