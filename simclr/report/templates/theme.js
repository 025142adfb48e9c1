// Light or dark as the system has it, until someone chooses; a page that is printed is light.
(() => {
  const html = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (html.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `change to the ${isDark() ? "light" : "dark"} theme`);
    document.dispatchEvent(new Event("themechange"));
  };
  try { html.dataset.theme = localStorage.getItem("simclr-theme") ?? ""; } catch { /* storage may be forbidden */ }
  button.hidden = false;
  button.addEventListener("click", () => {
    html.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("simclr-theme", html.dataset.theme); } catch { /* then it is forgotten */ }
    show();
  });
  system.addEventListener("change", show);
  let before = "";
  window.addEventListener("beforeprint", () => { before = html.dataset.theme; html.dataset.theme = "light"; show(); });
  window.addEventListener("afterprint", () => { html.dataset.theme = before; show(); });
  show();
})();
const copyText = async (text, button) => {
  const said = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // where the page is not trusted with the clipboard
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = said; }, 1500);
};
document.querySelectorAll("[data-copy]").forEach((button) => {
  button.hidden = false;
  button.addEventListener("click", () => copyText(document.getElementById(button.dataset.copy).textContent, button));
});
