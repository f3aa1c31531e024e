package image

import (
	"encoding/base64"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// users gives the users of what is known for a repository, the best first.
func (p *Pulls) users(registry, behind, repository string) (out []string) {
	for _, ac := range p.find(registry, behind, repository) {
		out = append(out, ac.Username+ac.IdentityToken+ac.RegistryToken)
	}
	return out
}

func TestPullsKeepWhatWorked(t *testing.T) {
	p := &Pulls{}
	check := func(what string, want ...string) {
		t.Helper()
		if d := cmp.Diff(want, p.users("reg.test", "", "ns/app")); d != "" {
			t.Errorf("%s: %s", what, d)
		}
	}
	came := func(user string) func(bool) {
		return p.Came("reg.test/ns/app:1", PullCredential{Username: user, Password: "p"})
	}
	a := came("a")
	check("while it goes on", "a")
	a(true)
	check("it succeeded", "a")
	b := came("b")
	check("a second one goes on", "b", "a")
	b(false)
	check("it failed", "a")
	came("a")(false)
	check("what worked once fails once", "a")
	c := came("c")
	c(true)
	c(false)
	check("a newer one succeeded", "c")
	p.Came("reg.test/ns/app@sha256:"+fmt.Sprintf("%064d", 0), PullCredential{})(true)
	check("a pull without any", "c")
	for i := range 2 * maxPulledEach {
		defer came(fmt.Sprintf("guess%d", i))(false)
	}
	got := p.users("reg.test", "", "ns/app")
	if len(got) != maxPulledEach || got[maxPulledEach-1] != "c" {
		t.Errorf("many guesses: %v", got)
	}
}

func TestPullsAreOfOneRepository(t *testing.T) {
	p := &Pulls{}
	p.Came("nginx", PullCredential{Auth: base64.StdEncoding.EncodeToString([]byte("hub:a:b"))})
	p.Came("docker.io/other/app", PullCredential{IdentityToken: "id", ServerAddress: "https://index.docker.io/v1/"})
	p.Came("reg.test:5000/x", PullCredential{RegistryToken: "tok", ServerAddress: "other.test"})
	for _, tt := range []struct {
		registry, behind, repo string
		want                   []string
	}{
		{"docker.io", "", "library/nginx", []string{"hub"}},
		{"docker.io", "", "other/app", []string{"id"}},
		{"docker.io", "", "other/else", nil},
		{"other.test", "", "library/nginx", nil},
		{"reg.test:5000", "", "x", nil}, // it is for another host
		{"other.test", "reg.test:5000", "x", []string{"tok"}},
		{"mirror.test", "docker.io", "library/nginx", []string{"hub"}},
		{"mirror.test", "docker.io", "other/app", nil},
	} {
		if d := cmp.Diff(tt.want, p.users(tt.registry, tt.behind, tt.repo)); d != "" {
			t.Errorf("%s (%s) %s: %s", tt.registry, tt.behind, tt.repo, d)
		}
	}
	if ac := p.find("docker.io", "", "library/nginx")[0]; ac.Password != "a:b" {
		t.Errorf("password %q", ac.Password)
	}
}

func TestPullsAreBounded(t *testing.T) {
	p := &Pulls{}
	p.Came("reg.test/large", PullCredential{Username: "u", Password: string(make([]byte, maxPullSize))})(true)
	p.Came("not a name", PullCredential{Username: "u"})(true)
	p.Came("sha256:"+fmt.Sprintf("%064d", 0), PullCredential{Username: "u"})(true)
	if len(p.repos) != 0 {
		t.Errorf("kept: %d", len(p.repos))
	}
	p.Came("reg.test/first", PullCredential{Username: "u"})(true)
	for i := range maxPulled - 1 {
		p.Came(fmt.Sprintf("reg.test/r%d", i), PullCredential{Username: "u"})(true)
	}
	p.find("reg.test", "", "first") // it is used
	p.Came("reg.test/one-more", PullCredential{Username: "u"})(true)
	if len(p.repos) != maxPulled || p.users("reg.test", "", "first") == nil || p.users("reg.test", "", "r0") != nil {
		t.Errorf("%d repositories, the one that was not used: %v", len(p.repos), p.users("reg.test", "", "r0"))
	}
}

func FuzzPullCredential(f *testing.F) {
	f.Add("nginx", "dTpw", "https://index.docker.io/v1/")
	f.Add("reg.test:5000/a@sha256:00", "!", "::")
	f.Fuzz(func(t *testing.T, name, auth, server string) {
		p := &Pulls{}
		p.Came(name, PullCredential{Auth: auth, ServerAddress: server})(true)
		if len(p.repos) == 0 {
			return
		}
		n, err := ParseName(name)
		if err != nil || n.Registry() == "" {
			t.Fatalf("kept for %q", name)
		}
		for _, ac := range p.find(n.Registry(), "", n.Repository()) {
			if ac.Username == "" {
				t.Errorf("a credential without a user from %q", auth)
			}
		}
	})
}
