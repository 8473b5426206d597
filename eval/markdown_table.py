"""Tables for pages and model cards."""


def markdown_table(rows: list[list[str]], text_columns: int = 1) -> str:
    header, *body = rows
    rule = ["---" if i < text_columns else "---:" for i in range(len(header))]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [header, rule, *body]]
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)
