// draws every figure from the specification of its name; colours of text and grid are the page's own
const specs = JSON.parse(document.getElementById("specs").textContent);
const actions = { export: true, source: false, compiled: false, editor: false };
for (const figure of document.querySelectorAll("figure[data-points]")) {
  vegaEmbed(figure.querySelector(".plot"), specs[figure.id], { renderer: "svg", actions, downloadFileName: figure.id })
    .then(() => figure.setAttribute("data-drawn", "yes"))
    .catch((error) => console.error(figure.id, error));
}
